// Continuations side by side: without steering, steered, and with random features of equal rate as a control.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;
  const { asJson, controlFor, differing } = MFN.interventions;
  const NAMES = ["plain", "steered", "control"];
  const TITLES = { plain: "Without steering", steered: "Steered", control: "Control" };

  const empty = (names) => Object.fromEntries(names.map((name) => [name, { tokens: [], end: false }]));

  // Marks of tokens that differ from the text without steering; null until both are complete.
  const marksOf = (streams, name) => {
    if (!streams.plain.end || !streams[name].end) return null;
    const ids = (stream) => stream.tokens.map((each) => each.id);
    return differing(ids(streams.plain), ids(streams[name]))[1];
  };

  const plainMarks = (streams) => {
    if (!streams.plain.end || !streams.steered.end) return null;
    return differing(streams.plain.tokens.map((each) => each.id), streams.steered.tokens.map((each) => each.id))[0];
  };

  const Tokens = ({ tokens, marks }) =>
    tokens.map(({ text }, at) =>
      marks?.[at]
        ? html`<mark key=${at} class="differs">${MFN.visibleInText(text)}</mark>`
        : html`<span key=${at}>${MFN.visibleInText(text)}</span>`);

  const Stream = ({ name, streams, running, stopped, children }) => {
    const { tokens, end } = streams[name];
    const marks = name === "plain" ? plainMarks(streams) : marksOf(streams, name);
    const differ = marks && marks.filter(Boolean).length;
    return html`<section class="panel stream" data-stream=${name} aria-label=${TITLES[name]} aria-busy=${running && !end}>
      <h3>${TITLES[name]}</h3>
      ${children}
      <p class="generated" dir="auto"><${Tokens} tokens=${tokens} marks=${marks} />${running && !end && html`<span class="caret" aria-hidden="true"></span>`}</p>
      <p class="faint">${tokens.length} tokens${marks ? `, ${differ} differ${name === "plain" ? " from the steered text" : ""}` : ""}${stopped && !end ? ", stopped" : ""}</p>
    </section>`;
  };

  const Instead = ({ record, of }) => html`<li><a class="feature-name" href=${MFN.link("feature", { name: record.name })}>${record.name}</a>
    in place of ${of.name}: fires on ${MFN.percent(record.rate)} and ${MFN.percent(of.rate)} of tokens</li>`;

  const Stands = ({ entries }) => html`<details class="faint stands" open=${entries.length === 1}>
    <summary>${entries.length} random ${entries.length === 1 ? "feature" : "features"}</summary>
    <ul>${entries.map((entry) => html`<${Instead} key=${entry.record.name} ...${entry} />`)}</ul></details>`;

  const Perplexity = ({ answer }) => html`<div class="table-scroll"><table class="plain-table perplexity"><caption>Perplexity of the text below, over ${MFN.number(answer.tokens)} predicted tokens</caption>
    <thead><tr>${NAMES.filter((name) => name in answer && answer[name] !== null).map((name) => html`<th key=${name} scope="col" class="number">${TITLES[name]}</th>`)}</tr></thead>
    <tbody><tr>${NAMES.filter((name) => name in answer && answer[name] !== null).map((name) => html`<td key=${name} class="number" data-perplexity=${name}>${MFN.number(answer[name])}
      ${name !== "plain" && html` <span class="faint">${MFN.number(answer[name] / answer.plain)} ×</span>`}</td>`)}</tr></tbody></table></div>`;

  // One run: the control's features, the streams, and the perplexities, told to `tell` as they come.
  const run = async ({ entries, index, settings, withControl, signal }, tell) => {
    const control = withControl ? await controlFor(entries, index, settings.seed, signal) : null;
    const interventions = asJson(entries);
    const instead = control && { interventions: asJson(control) };
    const streams = empty(NAMES.slice(0, control ? 3 : 2));
    tell({ control, streams });
    const onEvent = (event) => {
      if (event.error || event.detail) throw new Error(event.error ?? event.detail);
      if (event.done) return tell({ seconds: event.seconds });
      const stream = streams[event.stream];
      streams[event.stream] = event.end ? { ...stream, end: true } : { ...stream, tokens: [...stream.tokens, { id: event.token_id, text: event.token }] };
      tell({ streams: { ...streams } });
    };
    const { prompt, positions, max, sample, temperature, seed, text } = settings;
    const body = { prompt, interventions, positions, max_new_tokens: max, sample, temperature, seed, control: instead };
    await MFN.api("generate", body, { signal, onEvent });
    if (text.trim()) {
      const perplexity = await MFN.api("perplexity", { text, interventions, control: instead }, { signal }).catch((error) => {
        if (signal.aborted) throw error;
        return { error };
      });
      tell({ perplexity });
    }
  };

  // The buttons and the texts. `settings` are those of the page; a change of them does not touch what stands there.
  const Generations = ({ entries, index, settings, withControl, onControl, ready }) => {
    const [state, setState] = useState({});
    const controller = useRef(null);
    useEffect(() => () => controller.current?.abort(), []);
    const start = (control) => {
      controller.current?.abort();
      const own = new AbortController();
      controller.current = own;
      const tell = (changes) => !own.signal.aborted && setState((last) => ({ ...last, ...changes }));
      setState({ running: true });
      run({ entries, index, settings, withControl: control, signal: own.signal }, tell).then(
        () => tell({ running: false }),
        (error) => tell({ running: false, error }),
      );
    };
    const stop = () => {
      controller.current.abort();
      setState((last) => ({ ...last, running: false, stopped: true }));
    };
    const toggle = () => {
      onControl(!withControl);
      if (ready) start(!withControl);
    };
    const shown = NAMES.filter((name) => state.streams?.[name]);
    return html`<div class="buttons">
        <button type="button" class="button primary" disabled=${!ready || state.running} onClick=${() => start(withControl)}>Generate</button>
        <button type="button" class="button" disabled=${!state.running} onClick=${stop}>Stop</button>
        <button type="button" class="button" aria-pressed=${withControl} onClick=${toggle}>Same with a random feature of equal rate</button>
        <span class="faint" role="status">${state.running ? "Generating …" : state.stopped ? "Stopped" : state.seconds ? `Done in ${MFN.number(state.seconds)} s` : ""}</span>
      </div>
      <${MFN.live.Failure} error=${state.error} title="The text cannot be generated" />
      ${shown.length > 0 && html`<div class="streams">${shown.map((name) => html`<${Stream} key=${name} name=${name} streams=${state.streams}
        running=${state.running} stopped=${state.stopped}>${name === "control" && html`<${Stands} entries=${state.control} />`}<//>`)}</div>
        <p class="faint">Tokens that differ are <mark class="differs">underlined</mark>.</p>`}
      <${MFN.live.Failure} error=${state.perplexity?.error} title="The perplexity cannot be measured" />
      ${state.perplexity && !state.perplexity.error && html`<${Perplexity} answer=${state.perplexity} />`}`;
  };

  MFN.live.Generations = Generations;
})();

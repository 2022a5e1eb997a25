// Steer: features or labels, how strongly, and what the model then writes.
"use strict";

(() => {
  const { html } = MFN;
  const { one, whole, NumberField } = MFN.live;
  const { readSetting, writeSetting, readInterventions, expand, asJson, asCommand, asPython } = MFN.interventions;
  const POSITIONS = { all: "all tokens", prompt: "the prompt", generated: "generated tokens" };
  const DEFAULTS = { max: 40, most: 200, temperature: 1, hottest: 5, seed: 0, largest: 2 ** 31 - 1 };

  // Rows of the address. A setting that cannot be read becomes an error, and the others stay.
  const rowsOf = (view) => {
    const rows = [];
    const errors = [];
    for (const text of MFN.all(view, "set")) {
      try {
        rows.push(readSetting(text));
      } catch (error) {
        errors.push(error);
      }
    }
    return { rows, error: errors[0] };
  };

  const expanded = (rows, index) => {
    try {
      return { entries: expand(rows, index) };
    } catch (error) {
      return { entries: [], error };
    }
  };

  const settingsOf = (view, limits) => {
    const prompt = one(view, "prompt");
    const temperature = Number(one(view, "temperature", DEFAULTS.temperature));
    const positions = one(view, "positions");
    return {
      prompt,
      text: one(view, "page", prompt),
      positions: positions in POSITIONS ? positions : "all",
      max: whole(one(view, "max"), 1, limits?.new_tokens ?? DEFAULTS.most, DEFAULTS.max),
      sample: one(view, "sample") === "1",
      temperature: temperature > 0 ? temperature : DEFAULTS.temperature,
      seed: whole(one(view, "seed"), 0, DEFAULTS.largest, DEFAULTS.seed),
    };
  };

  const Sampling = ({ settings, limits, change }) => html`<div class="buttons settings">
    <label>Steer <select value=${settings.positions} onChange=${(event) => change({ positions: event.target.value })}>
      ${Object.entries(POSITIONS).map(([name, title]) => html`<option key=${name} value=${name}>${title}</option>`)}</select></label>
    <label>New tokens <${NumberField} min="1" max=${limits?.new_tokens ?? DEFAULTS.most} value=${settings.max} onNumber=${(max) => change({ max })} /></label>
    <label><input type="checkbox" checked=${settings.sample} onChange=${(event) => change({ sample: event.target.checked ? 1 : undefined })} /> Sample</label>
    <label>Temperature <${NumberField} min="0.05" max=${DEFAULTS.hottest} step="0.05" disabled=${!settings.sample} value=${settings.temperature}
      onNumber=${(temperature) => change({ temperature })} /></label>
    <label>Seed <${NumberField} min="0" max=${DEFAULTS.largest} value=${settings.seed} onNumber=${(seed) => change({ seed })} /></label>
  </div>`;

  const Copies = ({ rows, entries, settings }) => {
    const command = asCommand(MFN.store.site.name, rows, settings);
    return html`<section class="panel" aria-label="The same in code"><h2>The same in code</h2>
      <pre tabindex="0" aria-label="Python"><code>${asPython(entries, settings).split("\n").map(MFN.visible).join("\n")}</code></pre>
      <div class="buttons"><${MFN.CopyButton} text=${asPython(entries, settings)} label="Copy as Python" />
        ${command && html`<${MFN.CopyButton} text=${command} label="Copy as mfn steer" />`}</div>
      ${!command && html`<p class="faint">A condition with a threshold has no form in <code>mfn steer</code>. Save it as a preset.</p>`}
      ${command && settings.sample && settings.temperature !== 1 && html`<p class="faint"><code>mfn steer</code> samples at the model's own temperature.</p>`}
    </section>`;
  };

  const Loaded = ({ index, session, view, change }) => {
    const { rows, error: unread } = rowsOf(view);
    const { entries, error: unmeant } = expanded(rows, index);
    const limits = session?.limits;
    const settings = settingsOf(view, limits);
    const onRows = (next) => change({ set: next.map(writeSetting) });
    const load = (preset) => change({ set: readInterventions(preset.interventions).map(writeSetting), positions: preset.positions });
    const ready = settings.prompt !== "" && entries.length > 0;
    return html`
      <label class="heading" for="prompt">Prompt</label>
      <textarea id="prompt" rows="3" value=${settings.prompt} spellcheck=${false} placeholder="The weather today is"
        onInput=${(event) => change({ prompt: event.target.value })}></textarea>
      <section class="panel" aria-label="Interventions"><h2>Interventions</h2>
        <${MFN.live.SteerRows} rows=${rows} index=${index} onRows=${onRows} />
        <${MFN.live.Failure} error=${unread ?? unmeant} title="Not all of this can be steered" />
      </section>
      <${Sampling} settings=${settings} limits=${limits} change=${change} />
      <${MFN.live.Generations} entries=${entries} index=${index} settings=${settings} ready=${ready}
        withControl=${one(view, "control") === "1"} onControl=${(on) => change({ control: on ? 1 : undefined })} />
      <label class="heading" for="page-text">Text whose perplexity is measured</label>
      <textarea id="page-text" rows="2" value=${settings.text} spellcheck=${false} onInput=${(event) => change({ page: event.target.value })}></textarea>
      <div class="panels">
        <${MFN.live.Presets} session=${session} empty=${entries.length === 0} onLoad=${load}
          current=${() => ({ interventions: asJson(entries), positions: settings.positions })} />
        <${Copies} rows=${rows} entries=${entries} settings=${settings} />
      </div>`;
  };

  const SteerPage = ({ params }) => {
    const [view, change] = MFN.live.useView("steer", params);
    const index = MFN.useLoaded(MFN.store.index, []);
    const session = MFN.live.useSession();
    return html`<${MFN.Heading} title="Steer" />
      <p class="lead">Choose features and how strongly they act. The model continues the prompt with and without them.</p>
      <${MFN.live.Failure} error=${session.error} />
      ${session.value?.active_preset && html`<${MFN.Notice}>The model's active preset, ${MFN.visible(session.value.active_preset)}, is off here. Load it to steer with it.<//>`}
      <${MFN.Loaded} state=${index} what="features">${(value) => html`<${Loaded} index=${value} session=${session.value} view=${view} change=${change} />`}<//>`;
  };

  MFN.pages.steer = MFN.live.page("Steer", SteerPage);
})();

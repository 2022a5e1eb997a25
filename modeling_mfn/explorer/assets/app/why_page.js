// Why this token: the features that moved a prediction, and the tokens that raised them.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;
  const { one, whole } = MFN.live;
  const READ_AFTER = 350; // milliseconds without a key
  const TOP = { least: 1, most: 20, start: 4 }; // features per layer

  // What is asked of the server. An empty "against" in the address is the mean; "none" is no reference.
  const questionOf = (view, text, position, limits) => {
    const against = one(view, "against", "mean");
    return {
      text,
      position,
      token: one(view, "token") || null,
      against: against === "none" ? null : against,
      top: whole(one(view, "top"), TOP.least, limits?.explained_features ?? TOP.most, TOP.start),
      method: one(view, "method") === "integrated" ? "integrated" : "gradient",
    };
  };

  // The reference: the mean logit, none, or a token that is typed.
  const Against = ({ view, change }) => {
    const against = one(view, "against", "mean");
    const [typed, setTyped] = useState(!["mean", "none"].includes(against));
    const choose = (event) => {
      setTyped(event.target.value === "token");
      change({ against: { mean: undefined, none: "none" }[event.target.value] });
    };
    const isToken = typed || !["mean", "none"].includes(against);
    return html`<label>Against <select value=${isToken ? "token" : against} onChange=${choose}>
        <option value="mean">the mean logit</option><option value="token">another token</option><option value="none">nothing</option></select></label>
      ${isToken && html`<label>Other token <input type="text" class="short" autocomplete="off" value=${["mean", "none"].includes(against) ? "" : against}
        onInput=${(event) => change({ against: event.target.value || undefined })} /></label>`}`;
  };

  const Options = ({ view, limits, change }) => {
    const { top, method } = questionOf(view, "", 0, limits);
    return html`<div class="buttons settings">
      <label>Predicted token <input type="text" class="short" autocomplete="off" value=${one(view, "token")} placeholder="the likeliest"
        onInput=${(event) => change({ token: event.target.value || undefined })} /></label>
      <${Against} view=${view} change=${change} />
      <label>Features per layer <${MFN.live.NumberField} min=${TOP.least} max=${limits?.explained_features ?? TOP.most} value=${top} onNumber=${(value) => change({ top: value })} /></label>
      <label>Method <select value=${method} onChange=${(event) => change({ method: event.target.value === "gradient" ? undefined : event.target.value })}>
        <option value="gradient">gradient</option><option value="integrated">integrated gradients (slower)</option></select></label>
    </div>`;
  };

  const Downloads = ({ answer, svg }) => html`<div class="buttons">
    <button type="button" class="button" onClick=${() => MFN.download("graph.json", JSON.stringify(answer.graph, null, 1))}>Download the graph as JSON</button>
    <button type="button" class="button" onClick=${() => MFN.download("explanation.svg", MFN.svgFile(svg.current), "image/svg+xml")}>Download the picture as SVG</button>
  </div>`;

  const Explained = ({ answer }) => {
    const svg = useRef(null);
    const [current, setCurrent] = useState(null);
    const { explanation } = answer;
    useEffect(() => setCurrent(null), [explanation]);
    return html`<${Downloads} answer=${answer} svg=${svg} />
      <${MFN.why.Picture} explanation=${explanation} current=${current} onShow=${setCurrent} svg=${svg} />
      <${MFN.why.Details} explanation=${explanation} name=${current} />
      <h2>The same numbers as tables</h2>
      <${MFN.why.Accounts} explanation=${explanation} />
      <${MFN.why.Features} explanation=${explanation} />`;
  };

  // The text's tokens; one is chosen, and what follows it is explained.
  const Question = ({ tokens, stale, text, limits, view, change }) => {
    const last = tokens.length - 1;
    const wanted = whole(one(view, "position"), -tokens.length, last, -1);
    const position = wanted < 0 ? wanted + tokens.length : wanted;
    const question = questionOf(view, text, position, limits);
    const ask = (signal) => MFN.api("explain", question, { signal });
    const answer = MFN.live.useAnswer(stale ? undefined : ask, [JSON.stringify(question), stale], READ_AFTER);
    return html`<p class="faint" id="why-position">The prediction after the marked token is explained. Later tokens are not read.</p>
      <${MFN.live.TokenPicker} tokens=${tokens} chosen=${position} label="Token after which the prediction is made" onPick=${(at) => change({ position: at })} />
      <${Options} view=${view} limits=${limits} change=${change} />
      <p class="faint" role="status">${answer.busy ? "Explaining …" : ""}</p>
      <${MFN.live.Failure} error=${answer.error} title="This cannot be explained" />
      ${answer.value && html`<${Explained} answer=${answer.value} />`}`;
  };

  const WhyPage = ({ params }) => {
    const [view, change] = MFN.live.useView("why", params);
    const text = one(view, "text");
    const session = MFN.live.useSession();
    const read = async (signal) => {
      const { tokens } = await MFN.api("read", { text, k: 1 }, { signal });
      return { text, tokens: tokens.map((each) => each.token) };
    };
    const reading = MFN.live.useAnswer(text ? read : null, [text], READ_AFTER);
    const type = (event) => change({ text: event.target.value, position: undefined });
    return html`<${MFN.Heading} title="Why this token" />
      <p class="lead">The features of each layer that moved a prediction, and the tokens that raised these features.</p>
      <label class="heading" for="why-text">Text</label>
      <textarea id="why-text" rows="3" value=${text} spellcheck=${false} onInput=${type} placeholder="The king is dead, and the"></textarea>
      <${MFN.live.Failure} error=${session.error ?? reading.error} title="The text cannot be read" />
      ${reading.busy && !reading.value && html`<${MFN.Loading} what="tokens" />`}
      ${reading.value && html`<${Question} tokens=${reading.value.tokens} text=${reading.value.text} stale=${reading.value.text !== text || !session.value} limits=${session.value?.limits} view=${view} change=${change} />`}`;
  };

  MFN.pages.why = MFN.live.page("Why", WhyPage);
})();

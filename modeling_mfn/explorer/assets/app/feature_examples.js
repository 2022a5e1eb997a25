// Places of the text where a feature fires: the strongest ones, and a sample of each octave of its activation.
"use strict";

(() => {
  const { html } = MFN;
  const { useState } = MFN.hooks;
  const AT_FIRST = { top: 6, stratum: 2 };
  const AROUND = 14; // tokens on each side of the active one, until a person wants all

  const Tokens = ({ example, strongest, whole }) => {
    const first = whole ? 0 : Math.max(0, example.offset - AROUND);
    const last = whole ? example.tokens.length : example.offset + AROUND + 1;
    const shown = example.tokens.slice(first, last);
    return html`${first > 0 && html`<span class="faint">… </span>`}
      ${shown.map((text, at) => {
        const value = example.activations[first + at];
        return html`<${MFN.Token} key=${first + at} text=${text} share=${value / strongest} current=${first + at === example.offset}
          title=${value ? `${MFN.visibleToken(text)}: ${MFN.number(value)}` : undefined} />`;
      })}
      ${last < example.tokens.length && html`<span class="faint"> …</span>`}`;
  };

  // Values in words, for keys and fingers, which do not hover.
  const Values = ({ example }) => {
    const active = example.tokens.map((text, at) => [text, example.activations[at]]).filter(([, value]) => value);
    return html`<p class="values faint">${active.map(([text, value]) => `${MFN.visibleToken(text)} ${MFN.number(value)}`).join("   ")}</p>`;
  };

  const Example = ({ example, strongest }) => {
    const [whole, setWhole] = useState(false);
    const [focused, setFocused] = useState(false);
    const long = example.tokens.length > 2 * AROUND + 1;
    const active = example.tokens[example.offset];
    return html`<li class="example">
      <div class="example-head">
        <span class="number strong">${MFN.number(example.activation)}</span>
        <${MFN.Token} text=${active} alone share=${example.activation / strongest} />
        <bdi class="faint">${MFN.visible(example.source ?? "")}</bdi>
        ${long && html`<button type="button" class="button quiet small" aria-expanded=${whole} onClick=${() => setWhole(!whole)}>
          ${whole ? "less text" : "more text"}</button>`}
      </div>
      <div class="example-text" role="group" aria-label=${`Text with ${MFN.visibleToken(active)}`} tabindex="0"
        onFocus=${() => setFocused(true)} onBlur=${() => setFocused(false)}>
        <${Tokens} example=${example} strongest=${strongest} whole=${whole} />
        ${focused && html`<${Values} example=${example} />`}
      </div>
    </li>`;
  };

  const Group = ({ title, examples, strongest, atFirst }) => {
    const [all, setAll] = useState(false);
    const shown = all ? examples : examples.slice(0, atFirst);
    return html`<section class="examples">
      <h3>${title}</h3>
      <ol>${shown.map((each) => html`<${Example} key=${`${each.window}/${each.position}`} example=${each} strongest=${strongest} />`)}</ol>
      ${examples.length > shown.length && html`<button type="button" class="button" onClick=${() => setAll(true)}>
        Show ${examples.length - shown.length} more</button>`}
    </section>`;
  };

  // The lower ends of octaves that have examples, the largest first.
  const octaves = (examples) => {
    const ends = new Set(examples.filter((each) => each.kind !== "top").map((each) => each.stratum));
    return [...ends].sort((one, other) => other - one);
  };

  MFN.Examples = ({ record }) => {
    const { examples } = record;
    if (!examples.length) return html`<${MFN.Notice} kind="empty">The atlas has no example: the feature was not seen to fire.<//>`;
    const strongest = Math.max(...examples.map((each) => each.activation));
    const top = examples.filter((each) => each.kind === "top");
    const titled = (end) => (end === 0 ? "below the histogram" : `activation ${MFN.number(end)} to ${MFN.number(2 * end)}`);
    return html`<${Group} key="top" title="Largest activations" examples=${top} strongest=${strongest} atFirst=${AT_FIRST.top} />
      ${octaves(examples).map((end) => html`<${Group} key=${end} title=${`Sample: ${titled(end)}`} strongest=${strongest} atFirst=${AT_FIRST.stratum}
        examples=${examples.filter((each) => each.kind !== "top" && each.stratum === end)} />`)}`;
  };
})();

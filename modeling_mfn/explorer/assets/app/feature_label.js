// Labels of a feature, and the field for a person's own.
"use strict";

(() => {
  const { html } = MFN;
  const { useState } = MFN.hooks;
  const OWN = ["label", "source", "score", "feature"];

  const shown = (value) => (typeof value === "number" ? MFN.number(value) : MFN.visible(Array.isArray(value) ? value.join(", ") : String(value)));

  const Details = ({ label }) => {
    const details = Object.entries(label).filter(([name, value]) => !OWN.includes(name) && value !== null && typeof value !== "object");
    if (!details.length) return null;
    return html`<details><summary>details</summary><dl class="facts">
      ${details.map(([name, value]) => html`<div key=${name}><dt>${MFN.visible(name)}</dt><dd>${shown(value)}</dd></div>`)}
    </dl></details>`;
  };

  const Label = ({ label }) => html`<li>
    <bdi class="label-text">${MFN.visible(label.label)}</bdi>
    <span class="faint">${MFN.visible(label.source)}${typeof label.score === "number" ? `, score ${MFN.number(label.score)}` : ""}</span>
    <${Details} label=${label} />
  </li>`;

  const Editor = ({ name, current }) => {
    const [text, setText] = useState(current);
    const [told, setTold] = useState({});
    const save = async (event) => {
      event.preventDefault();
      try {
        await MFN.ownLabels.save(name, text);
        setTold({ done: MFN.store.site.live ? "Saved with the atlas." : "Saved in this browser." });
      } catch (error) {
        setTold({ error: error.message });
      }
    };
    return html`<form class="own-label" onSubmit=${save}>
      <label for="own-label">Your label</label>
      <div class="row">
        <input id="own-label" type="text" maxlength="1000" autocomplete="off" value=${text} placeholder="what is it about?"
          onInput=${(event) => setText(event.target.value)} />
        <button class="button" disabled=${text.trim() === current}>${text.trim() || !current ? "Save" : "Remove"}</button>
      </div>
      <p class="faint" role="status">${told.done ?? ""}</p>
      ${told.error && html`<${MFN.Notice} kind="error" title="Not saved">${told.error}<//>`}
    </form>`;
  };

  MFN.FeatureLabels = ({ record }) => {
    const own = record.labels.find((label) => label.source === "human")?.label ?? "";
    return html`<section class="panel">
      <h2>Labels</h2>
      ${record.labels.length > 0
        ? html`<ul class="labels">${record.labels.map((label) => html`<${Label} key=${label.source} label=${label} />`)}</ul>`
        : html`<p class="faint">No label yet.</p>`}
      <${Editor} key=${`${record.feature} ${own}`} name=${record.feature} current=${own} />
    </section>`;
  };
})();

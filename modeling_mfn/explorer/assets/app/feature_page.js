// The page of one feature.
"use strict";

(() => {
  const { html } = MFN;

  // A typical activation, short enough to read: what the buttons propose for steering.
  const strength = (record) => Number((record.mean_activation ?? 1).toPrecision(3));

  const python = (record) => `with model.steer({"${record.feature}": Clamp(${strength(record)})}):`;
  const command = (record) => `mfn steer MODEL "The" --set ${record.feature}=clamp:${strength(record)}`;
  const steering = (record) => ({ set: `${record.feature}=clamp:${strength(record)}` });
  const text = (record) => {
    const [example] = record.examples;
    return example ? { text: example.tokens.join(""), layer: record.layer, token: example.offset } : { layer: record.layer };
  };

  const Actions = ({ record }) => html`<div class="buttons">
    <${MFN.CopyButton} label="Copy Python" text=${python(record)} />
    <${MFN.CopyButton} label="Copy command" text=${command(record)} />
    <${MFN.CopyButton} label="Copy JSON" text=${() => JSON.stringify(record, null, 1)} />
    <a class="button" href=${MFN.link("steer", steering(record))}>Steer with it</a>
    <a class="button" href=${MFN.link("text", text(record))}>Read text</a>
  </div>`;

  const Neighbours = ({ names }) => html`<nav class="neighbours" aria-label="Neighbouring features">
    ${names.map(([title, name]) => name
      ? html`<a key=${title} class="button" rel=${title === "Next" ? "next" : "prev"} href=${MFN.link("feature", { name })}>${title}</a>`
      : html`<span key=${title} class="button" aria-disabled="true">${title}</span>`)}
  </nav>`;

  // [["Previous", "L6/11"], ["Next", null]]: in its layer, by index
  const neighbours = (name) => {
    const [layer, index] = name.slice(1).split("/").map(Number);
    const features = MFN.store.site.layers.find((each) => each.layer === layer)?.features ?? 0;
    const at = (place) => (place >= 0 && place < features ? `L${layer}/${place}` : null);
    return [["Previous", at(index - 1)], ["Next", at(index + 1)]];
  };

  const Feature = ({ record }) => html`
    <${Actions} record=${record} />
    <div class="columns">
      <div class="stack">
        <${MFN.FeatureLabels} record=${record} />
        <section class="panel"><h2>Where it fires</h2><${MFN.Examples} key=${record.feature} record=${record} /></section>
      </div>
      <div class="stack side">
        <${MFN.FeatureFacts} record=${record} />
        <${MFN.FeatureHistogram} record=${record} />
        <${MFN.FeatureEffects} record=${record} />
        <${MFN.FeatureRelatives} record=${record} />
      </div>
    </div>`;

  MFN.pages.feature = ({ params: { name } }) => {
    MFN.useOwnLabels();
    const state = MFN.useLoaded(() => MFN.store.record(name), [name]);
    const [[, previous], [, next]] = neighbours(name);
    MFN.useKeys((key) => {
      const to = { j: next, k: previous }[key];
      if (to) MFN.go("feature", { name: to });
      return Boolean(to);
    });
    const known = state.value?.feature === name ? state.value : null;
    const record = known && { ...known, labels: MFN.ownLabels.merged(name, known.labels) };
    const label = record?.labels[0]?.label;
    return html`<div class="feature-head">
        <${MFN.Heading} title=${MFN.visible(name)}><span class="feature-name">${MFN.visible(name)}</span>${" "}
          ${label ? html`<bdi>${MFN.visible(label)}</bdi>` : record && html`<span class="faint">no label</span>`}<//>
        <${Neighbours} names=${neighbours(name)} />
      </div>
      <${MFN.Loaded} state=${record || state.error ? state : {}} what="feature">${() => html`<${Feature} record=${record} />`}<//>`;
  };
})();

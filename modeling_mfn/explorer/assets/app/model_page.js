// What the model is, how it was trained, and what was measured.
"use strict";

(() => {
  const { html } = MFN;

  const shown = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value === "number") return MFN.number(value);
    return MFN.visible(typeof value === "object" ? JSON.stringify(value) : String(value));
  };

  const Facts = ({ facts }) => html`<dl class="facts">
    ${facts.map(([name, value]) => html`<div key=${name}><dt>${MFN.visible(name)}</dt><dd>${shown(value)}</dd></div>`)}</dl>`;

  const Panel = ({ title, children }) => html`<section class="panel"><h2>${title}</h2>${children}</section>`;

  const Layers = () => html`<${Panel} title="Features by layer"><div class="scroll" tabindex="0" role="group" aria-label="Features by layer"><table>
    <thead><tr><th>layer</th><th class="number">features</th><th class="number">dead</th><th class="number">active per token</th><th class="number">mean rate</th></tr></thead>
    <tbody>${MFN.store.site.layers.map((each) => html`<tr key=${each.layer}>
      <td><a href=${MFN.link("features", { layer: String(each.layer) })}>block ${each.layer}</a></td>
      <td class="number">${MFN.number(each.features)}</td><td class="number">${MFN.percent(each.dead_share)}</td>
      <td class="number">${MFN.number(each.active_features)}</td><td class="number">${MFN.percent(each.firing_rate_mean)}</td></tr>`)}
    </tbody></table></div><//>`;

  const Texts = () => {
    const { data } = MFN.store.site;
    if (!data) return null;
    const facts = [["tokens", data.tokens], ["windows", data.windows], ["tokens per window", data.window]];
    return html`<${Panel} title="Text of the atlas"><${Facts} facts=${facts} />
      ${data.sources?.length > 1 && html`<h3>Tokens by source</h3><${Facts} facts=${data.sources.map((each) => [each.name, each.tokens])} />`}<//>`;
  };

  const Curve = ({ name, points }) => {
    const values = points.map(([, value]) => value);
    const description = `${points.length} points from step ${MFN.number(points[0][0])} to ${MFN.number(points.at(-1)[0])}: ` +
      `first ${MFN.number(values[0])}, last ${MFN.number(values.at(-1))}, lowest ${MFN.number(Math.min(...values))}, highest ${MFN.number(Math.max(...values))}.`;
    const options = () => ({
      marginLeft: 48,
      x: { label: "step", ticks: 4 },
      y: { label: null, grid: true, ticks: 4, nice: true },
      marks: [Plot.lineY(points, { x: "0", y: "1", stroke: "var(--accent)", strokeWidth: 1.5 })],
    });
    return html`<div><h3>${MFN.visible(name)}</h3><${MFN.Chart} title=${`${name} during training`} description=${description} options=${options} height=${150} changes=${[points]} /></div>`;
  };

  const Training = ({ training }) => {
    const { curves = {}, arguments: settings, figures, ...others } = training;
    const plain = Object.entries(others).filter(([, value]) => value !== null && typeof value !== "object");
    return html`<${Panel} title="Training">
      <div class="two">
        ${plain.length > 0 && html`<div><h3>Run</h3><${Facts} facts=${plain} /></div>`}
        ${figures && html`<div><h3>At the end</h3><${Facts} facts=${Object.entries(figures)} /></div>`}
      </div>
      ${Object.keys(curves).length > 0 && html`<h3>Curves</h3><div class="curves">
        ${Object.entries(curves).map(([name, points]) => html`<${Curve} key=${name} name=${name} points=${points} />`)}</div>`}
      ${settings && html`<details><summary>Settings</summary><${Facts} facts=${Object.entries(settings)} /></details>`}<//>`;
  };

  const Fidelity = ({ rows }) => {
    const names = [...new Set(rows.flatMap(Object.keys))].filter((name) => !["weights", "k"].includes(name));
    const numeric = (name) => rows.some((row) => typeof row[name] === "number");
    const cell = (name) => (numeric(name) ? "number" : "");
    return html`<${Panel} title="Fidelity: perplexity"><div class="scroll" tabindex="0" role="group" aria-label="Perplexity"><table>
      <thead><tr>${names.map((name) => html`<th key=${name} class=${cell(name)}>${MFN.visible(name.replace("_", " "))}</th>`)}</tr></thead>
      <tbody>${rows.map((row, at) => html`<tr key=${at}>${names.map((name) => html`<td key=${name} class=${cell(name)}>${shown(row[name])}</td>`)}</tr>`)}</tbody>
    </table></div><//>`;
  };

  const estimate = (each) => {
    if (!each || typeof each.value !== "number") return "–";
    const interval = typeof each.low === "number" ? ` [${MFN.number(each.low)}, ${MFN.number(each.high)}]` : "";
    return `${MFN.number(each.value)}${interval}`;
  };

  const Verdict = ({ verdict }) => {
    const subjects = Object.entries(verdict.figures ?? {}).filter(([, measures]) => measures?.[verdict.headline]);
    return html`<li><h3>${shown(verdict.prediction)} <span class=${`outcome${verdict.outcome === "confirmed" ? " confirmed" : ""}`}>${shown(verdict.outcome)}</span></h3>
      <p>${shown(verdict.claim)}</p>
      ${subjects.length > 0 && html`<p class="faint">${shown(verdict.headline)}: ${subjects.map(([name, measures]) => `${MFN.visible(name)} ${estimate(measures[verdict.headline])}`).join("; ")}</p>`}
      <details><summary>Why</summary><p>${shown(verdict.criterion)}</p><p>${shown(verdict.reason)}</p></details></li>`;
  };

  const Presets = ({ presets }) => html`<${Panel} title="Steering presets"><ul class="related">
    ${Object.entries(presets).map(([name, preset]) => html`<li key=${name}><bdi>${MFN.visible(name)}</bdi>
      <span class="faint">${Object.keys(preset.interventions ?? {}).map((each) => html`<${MFN.FeatureLink} key=${each} name=${each} /> `)}</span></li>`)}</ul><//>`;

  const Model = ({ model }) => html`<div class="columns">
    <div class="stack"><${Panel} title="What it is"><${Facts} facts=${model.facts} /><//><${Layers} /><${Texts} /></div>
    <div class="stack">
      ${model.fidelity && html`<${Fidelity} rows=${model.fidelity} />`}
      ${model.verdicts && html`<${Panel} title="Predictions of the paper"><ul class="verdicts">${model.verdicts.map((each, at) => html`<${Verdict} key=${at} verdict=${each} />`)}</ul><//>`}
      ${Object.keys(model.presets ?? {}).length > 0 && html`<${Presets} presets=${model.presets} />`}
      ${!model.fidelity && !model.verdicts && html`<${Panel} title="Measures"><p class="faint">Nothing is measured yet. <code>mfn evaluate</code> measures fidelity and the paper's predictions.</p><//>`}
    </div></div>
    ${model.training ? html`<${Training} training=${model.training} />` : html`<${Panel} title="Training"><p class="faint">The model has no training record.</p><//>`}`;

  MFN.pages.model = () => {
    const state = MFN.useLoaded(() => MFN.store.model(), []);
    return html`<${MFN.Heading} title=${MFN.visible(MFN.store.site.name)} />
      <${MFN.Loaded} state=${state} what="model">${(model) => html`<${Model} model=${model} />`}<//>`;
  };
})();

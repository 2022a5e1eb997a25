// The numbers of the picture as tables, and those of one feature in a panel.
"use strict";

(() => {
  const { html } = MFN;
  const { accountOf, embeddingsParts, strongestInputs, byLayer, sum, withSums } = MFN.why;
  const DIGITS = 3;
  const number = (value) => MFN.live.signed(value, DIGITS);

  const AccountRow = ({ name, active, parts }) => {
    const named = Object.fromEntries(parts);
    return html`<tr data-account=${name}><th scope="row">${name}</th><td class="number">${MFN.number(active)}</td>
      ${["listed", "others", "baseline", "remainder"].map((part) => html`<td key=${part} class="number" data-part=${part}>${part in named ? number(named[part]) : ""}</td>`)}
      <td class="number">${number(sum(parts.map(([, value]) => value)))}</td></tr>`;
  };

  const Accounts = ({ explanation }) => html`<div class="table-scroll"><table class="plain-table" id="accounts">
    <caption>Account of each layer, in logits: listed features + others + baseline + remainder = the value</caption>
    <thead><tr><th scope="col">Layer</th>${["Active", "Listed features", "Others", "Baseline", "Remainder", "Sum"].map((name) => html`<th key=${name} scope="col" class="number">${name}</th>`)}</tr></thead>
    <tbody>${byLayer(explanation).map(accountOf).map(({ layer, active, parts }) => html`<${AccountRow} key=${layer} name=${`L${layer}`} active=${active} parts=${parts} />`)}
      ${explanation.embeddings && html`<${AccountRow} name="embeddings" active=${explanation.tokens.length}
        parts=${embeddingsParts(explanation.embeddings).map(([name, value]) => [name === "tokens" ? "listed" : name, value])} />`}</tbody>
  </table></div>`;

  const raisedBy = ({ inputs }, tokens) =>
    strongestInputs(inputs).map(([position, share]) => html`<span key=${position} class="with-share"><bdi class="token">${MFN.visibleToken(tokens[position])}</bdi> ${number(share)}</span> `);

  const restOf = ({ inputs }) => sum(inputs.by_token) - sum(strongestInputs(inputs).map(([, share]) => share));

  const FeatureLine = ({ feature, tokens }) => html`<tr data-feature=${feature.name}>
    <th scope="row"><${MFN.FeatureLink} name=${feature.name} label=${feature.label || null} /></th>
    <td class="number" data-number="attribution">${number(feature.attribution)}</td>
    <td class="number" data-number="ablation">${number(feature.ablation)}</td>
    <td><bdi class="token">${MFN.visibleToken(tokens[feature.position])}</bdi> (${feature.position})</td>
    <td class="number" data-number="activation">${MFN.number(feature.activation)}</td>
    ${feature.inputs
      ? html`<td>${raisedBy(feature, tokens)}</td><td class="number">${number(restOf(feature))}</td>
        <td class="number">${number(feature.inputs.baseline)}</td><td class="number">${number(feature.inputs.remainder)}</td><td class="number">${number(feature.inputs.value)}</td>`
      : html`<td class="faint" colspan="5">not traced to tokens</td>`}
  </tr>`;

  const sorted = (explanation) =>
    explanation.layers.flatMap((layer) => layer.features).map(withSums).sort((a, b) => Math.abs(b.attribution) - Math.abs(a.attribution));

  const Features = ({ explanation }) => html`<div class="table-scroll"><table class="plain-table" id="features-table">
    <caption>Listed features, the strongest first. Attribution and ablation are in logits. The parts on the right add up to the pre-activation.</caption>
    <thead><tr><th scope="col">Feature</th><th scope="col" class="number">Attribution</th><th scope="col" class="number">Ablation</th><th scope="col">Strongest on</th>
      <th scope="col" class="number">Activation</th><th scope="col">Raised by tokens</th>${["Other tokens", "Baseline", "Remainder", "Pre-activation"].map((name) => html`<th key=${name} scope="col" class="number">${name}</th>`)}</tr></thead>
    <tbody>${sorted(explanation).map((feature) => html`<${FeatureLine} key=${feature.name} feature=${feature} tokens=${explanation.tokens} />`)}</tbody>
  </table></div>`;

  // All numbers of the feature under the mouse or the focus.
  const Details = ({ explanation, name }) => {
    const feature = name && sorted(explanation).find((each) => each.name === name);
    if (!feature) return html`<aside class="why-details faint">Point at a feature, or move to it with Tab, to see its numbers.</aside>`;
    const { tokens } = explanation;
    return html`<aside class="why-details" aria-label="Numbers of the feature">
      <p><${MFN.FeatureLink} name=${feature.name} label=${feature.label || null} />${" "}
        <span class="number">${number(feature.attribution)} logits</span>
        ${feature.ablation !== null && html`<span class="faint">, measured by ablation ${number(feature.ablation)}</span>`}</p>
      <p>Active on ${feature.positions.map((position, at) => html`<span key=${position} class="with-share"><bdi class="token">${MFN.visibleToken(tokens[position])}</bdi>${" "}
        ${number(feature.attributions[at])} <span class="faint">activation ${MFN.number(feature.activations[at])}</span></span> `)}</p>
      ${feature.inputs && html`<p>Raised by ${raisedBy(feature, tokens)} <span class="faint">other tokens ${number(restOf(feature))}, baseline ${number(feature.inputs.baseline)},
        remainder ${number(feature.inputs.remainder)}</span></p>`}
    </aside>`;
  };

  Object.assign(MFN.why, { Accounts, Features, Details });
})();

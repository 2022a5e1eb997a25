// Next-token predictions at a token, with and without a feature, as pairs of bars in a table.
"use strict";

(() => {
  const { html } = MFN;

  const Bar = ({ share, most, kind }) => html`<span class=${`bar ${kind}`} style=${{ width: `${most ? (100 * share) / most : 0}%` }}></span>`;

  const Head = ({ feature }) => html`<thead><tr><th scope="col">Next token</th><td></td>
    <th scope="col" class="number"><span class="key plain"></span>as it is</th>
    ${feature && html`<th scope="col" class="number"><span class="key without"></span>without</th><th scope="col" class="number">points</th>`}</tr></thead>`;

  // In percentage points.
  const change = (plain, without) => `${without < plain ? "−" : "+"}${MFN.number(Math.abs(without - plain) * 100)}`;

  // rows: [[token, plain, without], ...]; without a third number, one bar a token.
  const Bars = ({ rows, caption, feature }) => {
    const most = Math.max(0, ...rows.flatMap((row) => row.slice(1)));
    return html`<div class="table-scroll"><table class="pairs">
      <caption>${caption}</caption>
      <${Head} feature=${feature} />
      <tbody>${rows.map(([token, plain, without], at) => html`<tr key=${at}>
        <th scope="row"><bdi class="token">${MFN.visibleToken(token)}</bdi></th>
        <td class="bars" aria-hidden="true"><${Bar} share=${plain} most=${most} kind="plain" />${feature && html`<${Bar} share=${without} most=${most} kind="without" />`}</td>
        <td class="number">${MFN.percent(plain)}</td>
        ${feature && html`<td class="number">${MFN.percent(without)}</td><td class="number">${change(plain, without)}</td>`}
      </tr>`)}</tbody>
    </table></div>`;
  };

  const Likeliest = ({ title, predictions }) => html`<p class="likeliest">${title}:${" "}
    ${predictions.slice(0, 5).map(([token, probability], at) => html`<span key=${at} class="with-share"><bdi class="token">${MFN.visibleToken(token)}</bdi> ${MFN.percent(probability)}</span>`)}</p>`;

  const Compared = ({ answer, feature }) => html`
    <${Bars} rows=${answer.changed} feature=${feature} caption="Largest changes" />
    <${Likeliest} title="Likeliest as it is" predictions=${answer.plain} />
    <${Likeliest} title=${`Likeliest without ${feature}`} predictions=${answer.steered} />`;

  // next: what the reading says of the token, shown until a feature is chosen.
  // stale: the text is being read anew, so that a request for the old one is given up.
  MFN.Predictions = ({ text, stale, position, token, next, feature, onFeature }) => {
    const ask = (signal) =>
      MFN.api("predict", { text, position, interventions: { [feature]: { kind: "ablate" } } }, { signal });
    const answer = MFN.live.useAnswer(!feature ? null : stale ? undefined : ask, [text, stale, position, feature]);
    return html`<section class="panel" aria-label="Predictions">
      <h2>After <bdi class="token">${MFN.visibleToken(token)}</bdi></h2>
      <${MFN.FeaturePicker} label="Compare without a feature" onPick=${(name) => onFeature(name)} />
      ${feature && html`<p class="chosen-feature"><${MFN.FeatureLink} name=${feature} /> is ablated on all tokens.
        <button type="button" class="button" onClick=${() => onFeature("")}>Remove</button></p>`}
      <${MFN.live.Failure} error=${answer.error} />
      ${feature && answer.busy && !answer.value && html`<${MFN.Loading} what="predictions" />`}
      ${feature && answer.value && html`<${Compared} answer=${answer.value} feature=${feature} />`}
      ${!feature && html`<${Bars} rows=${next} caption="Likeliest next tokens" />`}
    </section>`;
  };
})();

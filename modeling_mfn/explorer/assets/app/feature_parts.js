// Parts of a feature's page: figures, histogram, tokens, related features.
"use strict";

(() => {
  const { html } = MFN;

  const Fact = ({ name, children }) => html`<div><dt>${name}</dt><dd class="number">${children}</dd></div>`;

  MFN.FeatureFacts = ({ record }) => html`<section class="panel">
    <h2>Figures</h2>
    <dl class="facts">
      <${Fact} name="status">${MFN.visible(record.status)}<//>
      <${Fact} name="firing rate">${MFN.percent(record.firing_rate)} of tokens<//>
      <${Fact} name="firings">${MFN.number(record.firing_count)}<//>
      <${Fact} name="mean activation">${MFN.number(record.mean_activation)}<//>
      <${Fact} name="largest activation">${MFN.number(record.max_activation)}<//>
    </dl>
    <${BySource} record=${record} />
  </section>`;

  // Rates in each source of text. A bar is relative to the source with the highest rate.
  const BySource = ({ record }) => {
    const sources = MFN.store.site.data?.sources ?? []; // in the order of the counts
    if (sources.length < 2 || !record.source_counts) return null;
    const rates = sources.map(({ name, tokens }, at) => [name, record.source_counts[at] / tokens, record.source_counts[at]]);
    const most = Math.max(...rates.map(([, rate]) => rate));
    return html`<h3>By source of the text</h3><ul class="bars">
      ${rates.map(([name, rate, count]) => html`<li key=${name} title=${`${MFN.number(count)} firings`}>
        <bdi class="bar-name">${MFN.visible(name)}</bdi><${Bar} share=${most ? rate / most : 0} />
        <span class="number">${MFN.percent(rate)}</span></li>`)}
    </ul>`;
  };

  const Bar = ({ share }) => html`<span class="bar" aria-hidden="true"><span style=${{ width: `${(Math.min(Math.max(share, 0), 1) * 100).toFixed(1)}%` }}></span></span>`;

  // Bin b holds activations from edge b - 1 to edge b. The first and the last bin are open to one side.
  const bins = (record) => {
    const edges = MFN.store.site.histogram_edges;
    return record.histogram.map(([bin, count]) => ({
      from: edges[bin - 1] ?? edges[0] / 2 ** 0.25,
      to: edges[bin] ?? edges.at(-1) * 2 ** 0.25,
      count,
    }));
  };

  MFN.FeatureHistogram = ({ record }) => {
    if (!record.histogram.length) return null;
    const rows = bins(record);
    const mode = rows.reduce((best, row) => (row.count > best.count ? row : best));
    const total = rows.reduce((sum, row) => sum + row.count, 0);
    const description =
      `${MFN.number(total)} activations, from ${MFN.number(rows[0].from)} to ${MFN.number(rows.at(-1).to)}. ` +
      `Most frequent: ${MFN.number(mode.from)} to ${MFN.number(mode.to)}, ${MFN.number(mode.count)} times.`;
    const options = () => ({
      marginLeft: 52,
      marginBottom: 36,
      x: { type: "log", base: 2, label: "activation", tickFormat: MFN.number, ticks: 6 },
      y: { label: "firings", grid: true, ticks: 4, tickFormat: "~s" },
      marks: [
        Plot.rectY(rows, { x1: "from", x2: "to", y: "count", fill: "var(--accent)", insetRight: 1,
          title: (row) => `${MFN.number(row.from)} to ${MFN.number(row.to)}: ${MFN.number(row.count)}` }),
        Plot.ruleY([0], { stroke: "var(--field-line)" }),
      ],
    });
    return html`<section class="panel"><h2>Activations</h2>
      <${MFN.Chart} title=${`Histogram of the activations of ${record.feature}`} description=${description} options=${options} changes=${[record.feature]} />
    </section>`;
  };

  const Effects = ({ title, tokens, most }) => html`<div><h3>${title}</h3>
    ${tokens.length === 0 && html`<p class="faint">none</p>`}
    <ul class="bars">${tokens.map(([token, effect], at) => html`<li key=${at}>
      <bdi class="bar-name"><${MFN.Token} text=${token} alone /></bdi><${Bar} share=${Math.abs(effect) / most} />
      <span class="number">${effect > 0 ? "+" : ""}${MFN.number(effect)}</span></li>`)}</ul></div>`;

  MFN.FeatureEffects = ({ record }) => {
    const most = Math.max(...[...record.promoted, ...record.suppressed].map(([, effect]) => Math.abs(effect)), 1e-12);
    return html`<section class="panel"><h2>Next tokens</h2><div class="two">
      <${Effects} title="promoted" tokens=${record.promoted} most=${most} />
      <${Effects} title="suppressed" tokens=${record.suppressed} most=${most} />
    </div></section>`;
  };

  const Related = ({ title, layer, others, told }) => html`<div><h3>${title}</h3>
    ${others.length === 0 && html`<p class="faint">none</p>`}
    <ul class="related">${others.map((other) => html`<li key=${other[0]}><${MFN.FeatureLink} name=${`L${layer}/${other[0]}`} />
      <span class="number faint">${told(other)}</span></li>`)}</ul></div>`;

  MFN.FeatureRelatives = ({ record }) => html`<section class="panel"><h2>Related features</h2><div class="two">
    <${Related} title="nearest decoder directions (cosine)" layer=${record.layer} others=${record.nearest} told=${([, cosine]) => MFN.number(cosine)} />
    <${Related} title="fire on the same tokens (Jaccard)" layer=${record.layer} others=${record.co_active}
      told=${([, jaccard, count]) => `${MFN.number(jaccard)}, ${MFN.number(count)} times`} />
  </div></section>`;
})();

// Text: what a text makes fire, token by token and layer by layer, and what a feature does to the predictions.
"use strict";

(() => {
  const { html } = MFN;
  const { useMemo } = MFN.hooks;
  const { one, whole } = MFN.live;
  const LISTED = 8; // features per token and layer
  const BY_TOKEN = 3; // features per token in the second view
  const READ_AFTER = 350; // milliseconds without a key

  const FeatureRow = ({ name, activation, share, onCompare }) => html`<tr>
    <th scope="row"><${MFN.FeatureLink} name=${name} /></th>
    <td class="number">${MFN.number(activation)}</td>
    <td class="number">${share === null ? "–" : MFN.percent(share)}</td>
    <td><button type="button" class="button small" aria-label=${`Ablate ${name}`} onClick=${() => onCompare(name)}>Ablate</button></td>
  </tr>`;

  // Features of one token in one layer.
  const CellFeatures = ({ token, layer, features, most, onCompare }) => html`<section class="panel" aria-label="Features of the cell">
    <h2><bdi class="token">${MFN.visibleToken(token)}</bdi> in layer ${layer}</h2>
    ${features.length === 0
      ? html`<p class="faint">No feature is active here.</p>`
      : html`<div class="table-scroll"><table class="plain-table">
          <caption>${features.length >= most ? `The ${features.length} strongest features` : "All active features"}</caption>
          <thead><tr><th scope="col">Feature</th><th scope="col" class="number">Activation</th><th scope="col" class="number">Of its maximum</th><th scope="col"><span class="offscreen">Compare</span></th></tr></thead>
          <tbody>${features.map(([index, activation, share]) => html`<${FeatureRow} key=${index} name=${`L${layer}/${index}`}
            activation=${activation} share=${share} onCompare=${onCompare} />`)}</tbody>
        </table></div>`}
  </section>`;

  // The strongest features of one token in all layers: [[name, activation, share], ...].
  const strongestOf = (reading, at) =>
    reading.layers
      .flatMap(({ layer, features }) => features[at].map(([index, ...rest]) => [`L${layer}/${index}`, ...rest]))
      .sort((a, b) => (b[2] ?? -1) - (a[2] ?? -1))
      .slice(0, BY_TOKEN);

  const TokenTable = ({ reading, chosen, onPick }) => html`<div class="table-scroll"><table class="plain-table by-token">
    <caption>Strongest features of all layers, by token</caption>
    <thead><tr><th scope="col">Token</th><th scope="col">Features, with the share of their maximum</th><th scope="col">Likeliest next</th></tr></thead>
    <tbody>${reading.tokens.map(({ token, next }, at) => html`<tr key=${at} class=${at === chosen ? "chosen" : ""}>
      <th scope="row"><${MFN.Token} text=${token} alone current=${at === chosen} onClick=${() => onPick(at)} /></th>
      <td>${strongestOf(reading, at).map(([name, , share]) => html`<span key=${name} class="with-share"><${MFN.FeatureLink} name=${name} />
        <span class="faint">${share === null ? "–" : MFN.percent(share)}</span></span>`)}</td>
      <td>${next.length > 0 && html`<bdi class="token">${MFN.visibleToken(next[0][0])}</bdi> <span class="faint">${MFN.percent(next[0][1])}</span>`}</td>
    </tr>`)}</tbody>
  </table></div>`;

  const Views = ({ view, onChange }) => html`<fieldset class="choice"><legend>Show</legend>
    ${[["layers", "All layers"], ["tokens", "Strongest features by token"]].map(([name, title]) => html`<label key=${name}>
      <input type="radio" name="text-view" value=${name} checked=${view === name} onChange=${() => onChange(name)} /> ${title}</label>`)}
  </fieldset>`;

  // The row of the chosen layer; by default that of the strongest feature of the token.
  const rowOf = (layers, cells, token, wanted) => {
    const row = layers.indexOf(Number(wanted));
    if (wanted !== "" && row >= 0) return row;
    const shares = cells.map((each) => each[token]?.share ?? 0);
    return shares.indexOf(Math.max(...shares));
  };

  const Reading = ({ reading, most, text, view, change }) => {
    const index = MFN.useLoaded(MFN.store.index, []);
    const cells = useMemo(() => MFN.heat.cellsOf(reading), [reading]);
    const shares = useMemo(() => MFN.heat.sharesOf(cells, reading.tokens.length), [cells]);
    const tokens = useMemo(() => reading.tokens.map((each) => each.token), [reading]);
    const layers = reading.layers.map((each) => each.layer);
    const last = tokens.length - 1;
    const token = whole(one(view, "token"), 0, last, last);
    const row = rowOf(layers, cells, token, one(view, "layer"));
    const shown = one(view, "view") === "tokens" ? "tokens" : "layers";
    const pick = (at, ofRow) => change({ token: at, layer: ofRow === undefined ? undefined : layers[ofRow] });
    const compare = (without) => change({ without });
    return html`
      <${MFN.live.TokenPicker} tokens=${tokens} shares=${shares} chosen=${token} onPick=${(at) => pick(at)} label="Tokens of the text" />
      <${Views} view=${shown} onChange=${(name) => change({ view: name === "layers" ? undefined : name })} />
      ${shown === "layers"
        ? html`<${MFN.heat.HeatStrip} layers=${layers} cells=${cells} tokens=${tokens} token=${token} row=${row}
            byName=${index.value?.byName} onPick=${pick} />`
        : html`<${TokenTable} reading=${reading} chosen=${token} onPick=${(at) => pick(at)} />`}
      <div class="panels">
        <${CellFeatures} token=${tokens[token]} layer=${layers[row]} features=${reading.layers[row].features[token]} most=${most} onCompare=${compare} />
        <${MFN.Predictions} text=${text} stale=${one(view, "text") !== text} position=${token} token=${tokens[token]} next=${reading.tokens[token].next}
          feature=${one(view, "without")} onFeature=${compare} />
      </div>`;
  };

  const TextPage = ({ params }) => {
    const [view, change] = MFN.live.useView("text", params);
    const text = one(view, "text");
    const session = MFN.live.useSession();
    const most = Math.min(LISTED, session.value?.limits.features_per_token ?? 0);
    const read = async (signal) => ({ text, reading: await MFN.api("read", { text, k: most }, { signal }) });
    const answer = MFN.live.useAnswer(text ? (most ? read : undefined) : null, [text, most], READ_AFTER);
    const type = (event) => change({ text: event.target.value, token: undefined, layer: undefined });
    const count = answer.value?.reading.tokens.length;
    return html`<${MFN.Heading} title="Text" />
      <p class="lead">Type or paste a text. Below it stand the features that fire, token by token and layer by layer.</p>
      <label class="heading" for="text-input">Text</label>
      <textarea id="text-input" rows="4" value=${text} onInput=${type} spellcheck=${false} placeholder="The king rode home and the queen"></textarea>
      <p class="faint" role="status">${answer.busy ? "Reading …" : answer.value ? `${count} tokens` : ""}</p>
      <${MFN.live.Failure} error=${session.error ?? answer.error} title="The text cannot be read" />
      ${answer.value && html`<${Reading} reading=${answer.value.reading} most=${most} text=${answer.value.text} view=${view} change=${change} />`}`;
  };

  MFN.pages.text = MFN.live.page("Text", TextPage);
})();

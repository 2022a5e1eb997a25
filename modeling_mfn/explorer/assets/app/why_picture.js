// The picture of an explanation, as SVG. Widths are attributions, lines that lower are dashed, and each number has its sign.
"use strict";

(() => {
  const { html } = MFN;
  const { useMemo } = MFN.hooks;
  const { layOut, BAR, ROW_PADDING } = MFN.why;
  const { signed } = MFN.live;
  const CHARACTER = 7; // pixels of a character, at most
  const SMALLEST = 0.8; // of its size, to which the picture shrinks where there is less room

  const cut = (text, width) => {
    const characters = [...text];
    const most = Math.floor(width / CHARACTER);
    return characters.length > most ? `${characters.slice(0, most - 1).join("")}…` : text;
  };

  const direction = (value) => (value < 0 ? "lowers" : "raises");

  // A line that turns to its end at once, so that lines of one column part soon.
  const path = ({ from: [x0, y0], to: [x1, y1], bend }) => {
    const rise = y0 - y1;
    if (bend !== undefined) return `M${x0},${y0}C${bend},${y0} ${x1},${y0 - rise * 0.35} ${x1},${y1}`;
    return `M${x0},${y0}C${x0 + (x1 - x0) * 0.4},${y0 - rise * 0.2} ${x1},${y1 + rise * 0.5} ${x1},${y1}`;
  };

  const Edge = ({ edge, dim, lit }) => html`<path class=${`why-edge ${direction(edge.weight)}${dim ? " dim" : ""}${lit ? " lit" : ""}`}
    d=${path(edge)} stroke-width=${edge.width.toFixed(2)} fill="none"
    data-feature=${edge.feature} data-weight=${edge.weight} data-from=${edge.position ?? "feature"} />`;

  // Sums up a feature in one line, for its name and its tooltip.
  const told = (feature, tokens) =>
    `${feature.name}${feature.label ? ` ${MFN.visible(feature.label)}` : ""}: ${signed(feature.attribution, 3)} logits, ` +
    `strongest on ${MFN.visibleToken(tokens[feature.position])} (token ${feature.position}), activation ${MFN.number(feature.activation)}`;

  // The inner svg cuts what is too wide for its node, in every font; the title says all of it.
  const Node = ({ node, tokens, current, onShow }) => {
    const { feature, x, y, width, height } = node;
    const show = () => onShow(feature.name);
    return html`<a class=${`why-node ${direction(feature.attribution)}${current ? " current" : ""}`} href=${MFN.link("feature", { name: feature.name })}
        data-feature=${feature.name} onFocus=${show} onMouseEnter=${show}>
      <title>${told(feature, tokens)}</title>
      <rect class="why-box" x=${x} y=${y} width=${width} height=${height} rx="5" />
      <svg x=${x} y=${y} width=${width - 4} height=${height} overflow="hidden">
        <text x="8" y="16" class="why-name">${feature.name}</text>
        <text x=${width - 8} y="16" class="why-number" text-anchor="end">${signed(feature.attribution)}</text>
        <text x="8" y="32" class="why-label">${feature.label ? cut(MFN.visible(feature.label), width - 12) : ""}</text>
      </svg>
    </a>`;
  };

  const Bars = ({ parts, scale, y }) => parts.map(([name, value], at) => {
    const top = y + at * BAR.step;
    const length = Math.abs(value) * scale.unit;
    const start = value < 0 ? scale.zero - length : scale.zero;
    return html`<g key=${name} class=${`why-bar ${name} ${direction(value)}`} data-part=${name} data-value=${value}>
      <text x=${scale.x} y=${top + 10} class="why-small">${name}</text>
      <rect x=${start} y=${top + 1} width=${Math.max(length, 0.5)} height=${BAR.height} />
      <text x=${scale.x + scale.width} y=${top + 10} class="why-number" text-anchor="end">${signed(value)}</text>
    </g>`;
  });

  const Row = ({ row, layout, tokens, current, onShow }) => html`<g>
    <line class="why-rule" x1="0" x2=${layout.width} y1=${row.y} y2=${row.y} />
    <text x="4" y=${row.y + ROW_PADDING + 14} class="why-layer">L${row.layer}</text>
    <g data-layer=${row.layer}><${Bars} parts=${row.parts} scale=${layout.bars} y=${row.y + ROW_PADDING} />
      <line class="why-axis" x1=${layout.bars.zero} x2=${layout.bars.zero} y1=${row.y + ROW_PADDING - 3} y2=${row.y + ROW_PADDING + row.parts.length * BAR.step} /></g>
    ${row.nodes.map((node) => html`<${Node} key=${node.feature.name} node=${node} tokens=${tokens} current=${node.feature.name === current} onShow=${onShow} />`)}
  </g>`;

  const TokenBox = ({ column, layout, explanation }) => {
    const { y, height } = layout.tokens;
    const shares = explanation.embeddings?.by_token;
    const share = shares && MFN.why.sum(column.positions.map((position) => shares[position]));
    const texts = column.positions.map((position) => explanation.tokens[position]);
    const text = column.hidden ? `${texts.length} more` : cut(MFN.visibleToken(texts[0]), column.width - 10);
    return html`<g class=${`why-token${column.hidden ? " hidden-tokens" : ""}`}>
      <title>${texts.map(MFN.visibleToken).join(" ")}</title>
      <rect x=${column.x} y=${y} width=${column.width} height=${height} rx="5" />
      <svg x=${column.x} y=${y} width=${column.width} height=${height} overflow="hidden">
        <text x=${column.width / 2} y=${shares ? 16 : 24} text-anchor="middle" class="why-token-text">${text}</text>
        ${shares && html`<text x=${column.width / 2} y="32" text-anchor="middle" class="why-number">${signed(share)}</text>`}
      </svg>
    </g>`;
  };

  const contrastOf = (target) => ({ mean: " above the mean", token: ` above ${MFN.visibleToken(target.against_token ?? "")}` })[target.against] ?? "";

  const Top = ({ box, target }) => html`<g class="why-target">
    <rect x=${box.x} y=${box.y} width=${box.width} height=${box.height} rx="6" />
    <svg x=${box.x} y=${box.y} width=${box.width} height=${box.height} overflow="hidden">
      <text x=${box.width / 2} y="22" text-anchor="middle" class="why-token-text">${cut(MFN.visibleToken(target.token), box.width - 16)}</text>
      <text x=${box.width / 2} y="41" text-anchor="middle" class="why-small">${cut(`logit ${target.value.toFixed(2)}${contrastOf(target)}, probability ${MFN.percent(target.probability)}`, box.width + 40)}</text>
    </svg></g>`;

  const Heads = ({ layout, value }) => html`<g>
    <text x="4" y="24" class="why-layer">Account of each layer, in logits</text>
    <text x="4" y="42" class="why-small">The four parts add up to ${value.toFixed(2)}.</text>
  </g>`;

  const legendOf = ({ scales, embeddings }) =>
    `Full lines raise, dashed lines lower. The widest line into the predicted token is ${scales.logit.toFixed(2)} logits. ` +
    "Bars of layers have one scale" + (embeddings ? ", bars of the text their own. " : ". ") +
    (scales.input ? `The widest line from a token is ${scales.input.toFixed(2)} in units of its feature; a feature has three such lines at most, none below a tenth of its largest.` : "No feature is traced to tokens.");

  // onShow(name) gets the feature under the mouse or the focus.
  const Picture = ({ explanation, current, onShow, svg }) => {
    const layout = useMemo(() => layOut(explanation), [explanation]);
    const { width, height, rows, edges, columns, top } = layout;
    const title = `Why ${MFN.visibleToken(explanation.target.token)}`;
    return html`<div class="why-scroll" role="group" aria-label="Picture of the explanation" tabindex="0">
      <svg ref=${svg} class="why-picture" role="group" aria-labelledby="why-title" viewBox=${`0 0 ${width} ${height}`} width=${width} height=${height}
        style=${{ width: `clamp(${Math.round(SMALLEST * width)}px, 100%, ${width}px)` }}>
        <title id="why-title">${title}</title>
        <desc>${legendOf(layout)}</desc>
        <rect class="why-page" width=${width} height=${height} />
        <${Heads} layout=${layout} value=${explanation.target.value} />
        <g>${edges.map((edge, at) => html`<${Edge} key=${at} edge=${edge} dim=${current && edge.feature !== current} lit=${edge.feature === current} />`)}</g>
        ${rows.map((row) => html`<${Row} key=${row.layer} row=${row} layout=${layout} tokens=${explanation.tokens} current=${current} onShow=${onShow} />`)}
        <line class="why-rule" x1="0" x2=${width} y1=${layout.tokens.y - 20} y2=${layout.tokens.y - 20} />
        <text x="4" y=${layout.tokens.y + 24} class="why-layer">text</text>
        ${columns.map((column) => html`<${TokenBox} key=${column.x} column=${column} layout=${layout} explanation=${explanation} />`)}
        ${layout.embeddings && html`<g data-layer="embeddings"><${Bars} parts=${layout.embeddings} scale=${layout.textBars} y=${layout.tokens.y - 2} /></g>`}
        <${Top} box=${top} target=${explanation.target} />
      </svg></div>
      <p class="faint">${legendOf(layout)} Each layer accounts for the whole value: compare layers, and do not add them.</p>`;
  };

  MFN.why.Picture = Picture;
})();

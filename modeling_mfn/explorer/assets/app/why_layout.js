// Places of the parts of an explanation in its picture: tokens at the bottom, layers above, the predicted token on top.
//
// Nothing is drawn here, and no number is changed.
"use strict";

(() => {
  const NODE = { width: 136, height: 40, gap: 6 };
  const COLUMN = { gap: 8, empty: 66, gutter: 44 }; // lines to the top run in the gutters of columns with nodes
  const LANES = 2; // nodes side by side over one token, where a layer has more than two there
  const ROW_PADDING = 14;
  const BAR = { height: 12, step: 17, label: 66, span: 120, number: 56, left: 40 };
  const TOKENS = BAR.left + BAR.label + BAR.span + BAR.number + 28; // where the first token begins
  const TOP = { width: 360, height: 52, space: 62 };
  const DRAWN = { most: 3, least: 0.1 }; // lines from tokens to a feature, and their size next to the largest of them
  const LINE = { least: 0.8, most: 7 };

  const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
  const byLayer = (explanation) => [...explanation.layers].sort((a, b) => b.layer - a.layer);

  // A listed feature with the token of its largest attribution, as `FeatureAttribution` has it.
  function withSums(feature) {
    const sizes = feature.attributions.map(Math.abs);
    const at = sizes.indexOf(Math.max(...sizes));
    return {
      ...feature,
      name: `L${feature.layer}/${feature.index}`,
      label: (feature.atlas && feature.atlas.label) || "",
      attribution: sum(feature.attributions),
      position: feature.positions[at],
      activation: feature.activations[at],
      drawnInputs: feature.inputs ? drawnInputs(feature.inputs) : [],
    };
  }

  // The tokens with the largest shares in a number: [[position, share], ...], the largest first.
  function strongestInputs(inputs) {
    const shares = inputs.by_token.map((share, position) => [position, share]).filter(([, share]) => share !== 0);
    return shares.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, DRAWN.most);
  }

  function drawnInputs(inputs) {
    const strongest = strongestInputs(inputs);
    return strongest.filter(([, share]) => Math.abs(share) >= DRAWN.least * Math.abs(strongest[0][1]));
  }

  // A layer's account of the value: value = listed + others + baseline + remainder.
  function accountOf(layer) {
    const features = layer.features.map(withSums);
    const listed = sum(features.map((feature) => feature.attribution));
    const others = sum(layer.by_token) - listed;
    const parts = [["listed", listed], ["others", others], ["baseline", layer.baseline], ["remainder", layer.remainder]];
    return { layer: layer.layer, active: layer.active, features, parts };
  }

  const embeddingsParts = (inputs) => [
    ["tokens", sum(inputs.by_token)],
    ["baseline", inputs.baseline],
    ["remainder", inputs.remainder],
  ];

  // The most nodes that a layer has over each token.
  function deepest(accounts) {
    const most = new Map();
    for (const { features } of accounts) {
      const counts = new Map();
      for (const { position } of features) counts.set(position, (counts.get(position) || 0) + 1);
      for (const [position, count] of counts) most.set(position, Math.max(count, most.get(position) || 0));
    }
    return most;
  }

  // Columns: one for each token with a node or a line, and one for each run of other tokens.
  function columnsOf(tokens, used, depths) {
    const columns = [];
    for (let at = 0; at < tokens.length; at++) {
      const last = columns[columns.length - 1];
      if (used.has(at)) columns.push({ positions: [at], unused: false });
      else if (last && last.unused) last.positions.push(at);
      else columns.push({ positions: [at], unused: true });
    }
    let x = TOKENS;
    for (const column of columns) {
      const depth = depths.get(column.positions[0]) || 0;
      column.lanes = depth > LANES ? LANES : Math.min(depth, 1);
      column.hidden = column.unused && column.positions.length > 1;
      const gutter = column.lanes ? COLUMN.gutter : 0;
      column.x = x + gutter;
      column.width = column.lanes ? column.lanes * (NODE.width + NODE.gap) - NODE.gap : COLUMN.empty;
      x += column.width + COLUMN.gap + gutter * Math.max(column.lanes, 1);
    }
    return columns;
  }

  function usedTokens(accounts, explanation) {
    const used = new Set([explanation.tokens.length - 1]);
    for (const { features } of accounts)
      for (const feature of features) {
        used.add(feature.position);
        feature.drawnInputs.forEach(([position]) => used.add(position));
      }
    if (explanation.embeddings) drawnInputs(explanation.embeddings).forEach(([position]) => used.add(position));
    return used;
  }

  const centre = ({ x, width }) => x + width / 2;

  // One layer: its nodes over their tokens, in one or two lanes.
  function rowOf(account, y, columnAt) {
    const counts = new Map();
    const nodes = account.features.map((feature) => {
      const column = columnAt.get(feature.position);
      const place = counts.get(column) || 0;
      counts.set(column, place + 1);
      const lane = place % column.lanes;
      const x = column.x + lane * (NODE.width + NODE.gap);
      const line = Math.floor(place / column.lanes);
      return { feature, lane, x, y: y + ROW_PADDING + line * (NODE.height + NODE.gap), width: NODE.width, height: NODE.height };
    });
    const ends = nodes.map((node) => node.y + NODE.height);
    const height = Math.max(...ends, y + ROW_PADDING + barsHeight(account.parts)) + ROW_PADDING - y;
    return { ...account, nodes, y, height };
  }

  const barsHeight = (parts) => parts.length * BAR.step;

  // One scale for the bars of all layers, which holds 0 and every part. The row of the text has its own.
  function barScale(accounts) {
    const values = accounts.flatMap((parts) => parts.map(([, value]) => value));
    const least = Math.min(0, ...values);
    const most = Math.max(0, ...values);
    const unit = BAR.span / (most - least || 1);
    return { x: BAR.left, zero: BAR.left + BAR.label - least * unit, unit, width: BAR.label + BAR.span + BAR.number };
  }

  const widest = (edges) => Math.max(0, ...edges.map((edge) => Math.abs(edge.weight)));
  const withWidths = (edges, most) =>
    edges.map((edge) => ({ ...edge, width: LINE.least + (LINE.most - LINE.least) * (most ? Math.abs(edge.weight) / most : 0) }));

  // A line to the top leaves its node sideways, so that it does not run behind the nodes above.
  function lineToTop({ feature, lane, ...box }, rank, top) {
    const side = lane ? 1 : -1;
    const from = [lane ? box.x + box.width : box.x, box.y + box.height / 2];
    const bend = from[0] + side * (8 + ((rank * 7) % (COLUMN.gutter - 12)));
    const end = Math.min(Math.max(bend, top.x + 16), top.x + top.width - 16);
    return { feature: feature.name, weight: feature.attribution, from, bend, to: [end, top.y + top.height] };
  }

  function edgesOf(rows, top, tokensY, columnAt) {
    const toLogit = [];
    const toFeatures = [];
    for (const [rank, node] of rows.flatMap((row) => row.nodes).entries()) {
      const { feature, ...box } = node;
      toLogit.push(lineToTop(node, rank, top));
      for (const [position, weight] of feature.drawnInputs) {
        const start = [centre(columnAt.get(position)), tokensY];
        toFeatures.push({ feature: feature.name, position, weight, from: start, to: [centre(box), box.y + box.height] });
      }
    }
    const scales = { logit: widest(toLogit), input: widest(toFeatures) };
    return { edges: [...withWidths(toFeatures, scales.input), ...withWidths(toLogit, scales.logit)], scales };
  }

  // Everything that the picture draws, with its place.
  function layOut(explanation) {
    const accounts = byLayer(explanation).map(accountOf);
    const columns = columnsOf(explanation.tokens, usedTokens(accounts, explanation), deepest(accounts));
    const columnAt = new Map(columns.flatMap((column) => column.positions.map((position) => [position, column])));
    const last = columns[columns.length - 1];
    const end = Math.max(last.x + last.width + (last.lanes > 1 ? COLUMN.gutter : 0), TOKENS + TOP.width);
    const top = { x: (TOKENS + end - TOP.width) / 2, y: 8, width: TOP.width, height: TOP.height };
    let y = top.y + TOP.height + TOP.space;
    const rows = accounts.map((account) => {
      const row = rowOf(account, y, columnAt);
      y += row.height;
      return row;
    });
    const embeddings = explanation.embeddings ? embeddingsParts(explanation.embeddings) : null;
    const tokens = { y: y + 26, height: NODE.height, columns };
    const bars = barScale(accounts.map((each) => each.parts));
    const textBars = embeddings && barScale([embeddings]);
    const height = tokens.y + Math.max(NODE.height, embeddings ? barsHeight(embeddings) : 0) + 12;
    const lines = edgesOf(rows, top, tokens.y, columnAt);
    return { ...lines, columns, rows, tokens, top, bars, textBars, embeddings, width: end + COLUMN.gap, height };
  }

  MFN.why = { layOut, accountOf, embeddingsParts, strongestInputs, withSums, byLayer, sum, BAR, ROW_PADDING };
})();

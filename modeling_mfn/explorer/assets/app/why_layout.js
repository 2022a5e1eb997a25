// Places of the parts of an explanation in its picture: tokens at the bottom, layers above, the predicted token on top.
//
// Nothing is drawn here, and no number is changed.
"use strict";

(() => {
  const NODE = { width: 136, height: 40, gap: 6 };
  const COLUMN_GAP = 12;
  const HIDDEN_WIDTH = 64;
  const LEFT = 48;
  const ROW_PADDING = 14;
  const BAR = { height: 12, step: 17, label: 66, span: 130, number: 62, gap: 28 };
  const TOP = { height: 52, space: 58 };
  const DRAWN_INPUTS = 3;
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
      drawnInputs: feature.inputs ? strongestInputs(feature.inputs) : [],
    };
  }

  // The tokens with the largest shares in a number: [[position, share], ...], the largest first.
  function strongestInputs(inputs, count = DRAWN_INPUTS) {
    const shares = inputs.by_token.map((share, position) => [position, share]).filter(([, share]) => share !== 0);
    return shares.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, count);
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

  // Columns: one for each token with a node or a line, and a narrow one for each run of other tokens.
  function columnsOf(tokens, used) {
    const columns = [];
    for (let at = 0; at < tokens.length; at++) {
      const last = columns[columns.length - 1];
      if (used.has(at)) columns.push({ positions: [at], hidden: false });
      else if (last && last.hidden) last.positions.push(at);
      else columns.push({ positions: [at], hidden: true });
    }
    let x = LEFT;
    for (const column of columns) {
      column.x = x;
      column.width = column.hidden && column.positions.length > 1 ? HIDDEN_WIDTH : NODE.width;
      column.hidden = column.hidden && column.positions.length > 1;
      x += column.width + COLUMN_GAP;
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
    if (explanation.embeddings) strongestInputs(explanation.embeddings).forEach(([position]) => used.add(position));
    return used;
  }

  const centre = ({ x, width }) => x + width / 2;

  // One layer: its nodes over their tokens, one above the other where several share a token.
  function rowOf(account, y, columnAt) {
    const stacks = new Map();
    const nodes = account.features.map((feature) => {
      const column = columnAt.get(feature.position);
      const place = stacks.get(column) || 0;
      stacks.set(column, place + 1);
      return { feature, x: column.x, y: y + ROW_PADDING + place * (NODE.height + NODE.gap), ...sizeOfNode };
    });
    const deepest = Math.max(1, ...stacks.values());
    const height = 2 * ROW_PADDING + Math.max(deepest * (NODE.height + NODE.gap) - NODE.gap, barsHeight(account.parts));
    return { ...account, nodes, y, height };
  }

  const sizeOfNode = { width: NODE.width, height: NODE.height };
  const barsHeight = (parts) => parts.length * BAR.step;

  // One scale for the bars of all layers, which holds 0 and every part.
  function barScale(accounts, x) {
    const values = accounts.flatMap((parts) => parts.map(([, value]) => value));
    const least = Math.min(0, ...values);
    const most = Math.max(0, ...values);
    const unit = BAR.span / (most - least || 1);
    return { x, zero: x + BAR.label - least * unit, unit, width: BAR.label + BAR.span + BAR.number };
  }

  const widest = (edges) => Math.max(0, ...edges.map((edge) => Math.abs(edge.weight)));
  const withWidths = (edges, most) =>
    edges.map((edge) => ({ ...edge, width: LINE.least + (LINE.most - LINE.least) * (most ? Math.abs(edge.weight) / most : 0) }));

  function edgesOf(rows, top, tokensY, columnAt) {
    const toLogit = [];
    const toFeatures = [];
    for (const { feature, ...box } of rows.flatMap((row) => row.nodes)) {
      const from = [centre(box), box.y];
      toLogit.push({ feature: feature.name, weight: feature.attribution, from, to: [centre(top), top.y + top.height] });
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
    const columns = columnsOf(explanation.tokens, usedTokens(accounts, explanation));
    const columnAt = new Map(columns.flatMap((column) => column.positions.map((position) => [position, column])));
    const last = columns[columns.length - 1];
    const end = last.x + last.width;
    const top = { x: LEFT + (end - LEFT) / 2 - NODE.width, y: 8, width: 2 * NODE.width, height: TOP.height };
    let y = top.y + TOP.height + TOP.space;
    const rows = accounts.map((account) => {
      const row = rowOf(account, y, columnAt);
      y += row.height;
      return row;
    });
    const embeddings = explanation.embeddings ? embeddingsParts(explanation.embeddings) : null;
    const tokens = { y: y + 26, height: NODE.height, columns };
    const bars = barScale([...accounts.map((each) => each.parts), ...(embeddings ? [embeddings] : [])], end + BAR.gap);
    const height = tokens.y + Math.max(NODE.height, embeddings ? barsHeight(embeddings) : 0) + 12;
    const lines = edgesOf(rows, top, tokens.y, columnAt);
    return { ...lines, columns, rows, tokens, top, bars, embeddings, width: bars.x + bars.width, height };
  }

  MFN.why = { layOut, accountOf, embeddingsParts, strongestInputs, withSums, byLayer, sum, BAR, ROW_PADDING, LEFT };
})();

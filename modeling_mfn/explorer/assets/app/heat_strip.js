// Heat strip: one row per layer, one cell per token, shaded by the strongest feature there. A grid for the keyboard.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useMemo, useRef, useState } = MFN.hooks;

  // The largest share of its maximum that a feature has: {name, activation, share}, or null where none is active.
  // The atlas never saw some features active; they have no share.
  const strongest = (layer, features) => {
    if (!features.length) return null;
    const [index, activation, share] = features.reduce((best, each) => ((each[2] ?? -1) > (best[2] ?? -1) ? each : best));
    return { name: `L${layer}/${index}`, activation, share };
  };

  // [layer][token] -> strongest feature
  const cellsOf = (reading) => reading.layers.map(({ layer, features }) => features.map((each) => strongest(layer, each)));

  // Share per token: the strongest of all layers.
  const sharesOf = (cells, count) =>
    Array.from({ length: count }, (_, at) => Math.max(0, ...cells.map((row) => row[at]?.share ?? 0)));

  const described = (cell, token, layer, byName) => {
    const place = `${MFN.visibleToken(token)}, L${layer}`;
    if (!cell) return `${place}: no feature is active`;
    const label = byName?.get(cell.name)?.label;
    const strength = cell.share === null ? "never active in the atlas" : `${MFN.percent(cell.share)} of its maximum`;
    return `${place}: ${cell.name}${label ? ` ${MFN.visible(label)}` : ""}, ${strength}`;
  };

  // A row is drawn anew only if something in it has changed: a long text has thousands of cells.
  class Row extends preact.Component {
    shouldComponentUpdate(next) {
      return ["cells", "tokens", "byName", "focused", "chosen", "row"].some((name) => next[name] !== this.props[name]);
    }

    render({ layer, row, cells, tokens, byName, focused, chosen }) {
      return html`<div role="row" aria-rowindex=${row + 2}>
        <span role="rowheader" class="heat-layer">L${layer}</span>
        ${cells.map((cell, at) => html`<span key=${at} role="gridcell" data-row=${row} data-at=${at}
          class=${`heat-cell${at === chosen ? " chosen" : ""}`} tabindex=${at === focused ? 0 : -1}
          aria-selected=${at === chosen} aria-label=${described(cell, tokens[at], layer, byName)}
          style=${{ "--share": Math.min(cell?.share ?? 0, 1).toFixed(3) }}></span>`)}
      </div>`;
    }
  }

  const Header = ({ tokens, chosen }) => html`<div role="row" aria-rowindex="1" class="heat-head">
    <span role="columnheader" class="heat-layer">Layer</span>
    ${tokens.map((token, at) => html`<span key=${at} role="columnheader" class=${at === chosen ? "chosen" : ""}>
      <bdi>${MFN.visibleToken(token)}</bdi></span>`)}
  </div>`;

  const placeOf = (event) => {
    const cell = event.target.closest?.("[data-at]");
    return cell && { row: Number(cell.dataset.row), at: Number(cell.dataset.at) };
  };

  const moved = (key, control, { row, at }, rows, columns) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const ends = { Home: [control ? 0 : row, 0], End: [control ? rows - 1 : row, columns - 1], PageUp: [0, at], PageDown: [rows - 1, at] };
    const [nextRow, nextAt] = steps[key] ? [row + steps[key][0], at + steps[key][1]] : ends[key] ?? [null];
    if (nextRow === null) return null;
    return { row: Math.min(Math.max(nextRow, 0), rows - 1), at: Math.min(Math.max(nextAt, 0), columns - 1) };
  };

  // onPick(token, row) gets the place that a click or Enter chose.
  const HeatStrip = ({ layers, cells, tokens, token, row, byName, onPick }) => {
    const grid = useRef(null);
    const [focus, setFocus] = useState({ row, at: token });
    const [told, setTold] = useState(null);
    useEffect(() => setFocus({ row, at: token }), [row, token, cells]);
    const names = useMemo(() => tokens, [cells]);
    const onKeyDown = (event) => {
      const place = placeOf(event);
      if (!place) return;
      const next = moved(event.key, event.ctrlKey, place, cells.length, tokens.length);
      if (next) {
        setFocus(next);
        // at once: the next key may come before the next drawing
        grid.current.querySelector(`[data-row="${next.row}"][data-at="${next.at}"]`).focus();
      } else if (event.key === "Enter" || event.key === " ") onPick(place.at, place.row);
      else return;
      event.preventDefault();
    };
    const onClick = (event) => {
      const place = placeOf(event);
      if (place) onPick(place.at, place.row);
    };
    const tell = (event) => setTold(placeOf(event));
    const shown = told && cells[told.row]?.[told.at] !== undefined ? told : { row, at: token };
    return html`<div class="heat-scroll"><div class="heat" role="grid" aria-label="Features by layer and token"
        aria-rowcount=${cells.length + 1} aria-colcount=${tokens.length + 1} style=${{ "--columns": tokens.length }} ref=${grid}
        onKeyDown=${onKeyDown} onClick=${onClick} onMouseOver=${tell} onFocusIn=${tell} onMouseLeave=${() => setTold(null)}>
        <${Header} tokens=${tokens} chosen=${token} />
        ${cells.map((each, at) => html`<${Row} key=${at} row=${at} layer=${layers[at]} cells=${each} tokens=${names} byName=${byName}
          focused=${at === focus.row ? focus.at : -1} chosen=${at === row ? token : -1} />`)}
      </div></div>
      <p class="heat-told faint" aria-hidden="true">${described(cells[shown.row][shown.at], tokens[shown.at], layers[shown.row], byName)}</p>`;
  };

  MFN.heat = { HeatStrip, cellsOf, sharesOf };
})();

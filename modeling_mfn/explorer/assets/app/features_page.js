// The list of all features: search, filters, and the table. Its state is the address.
"use strict";

(() => {
  const { html } = MFN;
  const { useMemo, useRef, useState } = MFN.hooks;
  const LABELS = [["", "all"], ["any", "with a label"], ["none", "without a label"]];
  const FILTERS = ["q", "layer", "status", "labels", "rate_min", "rate_max", "auroc"];

  const least = (text) => (text === undefined || text === "" || Number.isNaN(Number(text)) ? null : Number(text));

  // params -> function of a row. Rates are typed in percent, as they are shown.
  const filter = (params) => {
    const words = MFN.search.matcher(params.q ?? "");
    const [low, high, auroc] = [least(params.rate_min), least(params.rate_max), least(params.auroc)];
    const labelled = { any: (row) => row.label, none: (row) => !row.label }[params.labels];
    return (row) =>
      (!params.layer || row.layer === Number(params.layer)) &&
      (!params.status || row.status === params.status) &&
      (!params.labels || (labelled ? labelled(row) : row.label && row.label_source === params.labels)) &&
      (low === null || row.rate * 100 >= low) &&
      (high === null || row.rate * 100 <= high) &&
      (auroc === null || row.auroc >= auroc) &&
      words(row);
  };

  const Choice = ({ label, value = "", choices, onChange }) => html`<label class="field"><span>${label}</span>
    <select value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${choices.map(([each, shown]) => html`<option key=${each} value=${each}>${shown}</option>`)}
    </select></label>`;

  const Least = ({ label, value = "", onChange, ...others }) => html`<label class="field narrow"><span>${label}</span>
    <input type="number" inputmode="decimal" step="any" value=${value} onInput=${(event) => onChange(event.target.value)} ...${others} />
  </label>`;

  const Filters = ({ rows, params, set, onDown }) => {
    const { statuses, sources } = useMemo(() => {
      const distinct = (field) => [...new Set(rows.map((row) => row[field]))].filter(Boolean).sort();
      return { statuses: distinct("status"), sources: distinct("label_source") };
    }, [rows]);
    const layers = MFN.store.site.layers.map(({ layer }) => [String(layer), `block ${layer}`]);
    const plain = (values) => values.map((value) => [value, MFN.visible(value)]);
    const onKeyDown = (event) => {
      if (event.key !== "ArrowDown") return;
      event.preventDefault();
      onDown();
    };
    return html`<form class="filters" role="search" aria-label="Features" onSubmit=${(event) => event.preventDefault()}>
      <label class="field search"><span>Search</span>
        <input type="search" data-search placeholder="label, token or L6/12" value=${params.q ?? ""} spellcheck=${false}
          onInput=${(event) => set({ q: event.target.value })} onKeyDown=${onKeyDown} /></label>
      <${Choice} label="Layer" value=${params.layer} choices=${[["", "all"], ...layers]} onChange=${(layer) => set({ layer })} />
      <${Choice} label="Status" value=${params.status} choices=${[["", "all"], ...plain(statuses)]} onChange=${(status) => set({ status })} />
      <${Choice} label="Labels" value=${params.labels} choices=${[...LABELS, ...plain(sources)]} onChange=${(labels) => set({ labels })} />
      <${Least} label="Rate from, %" value=${params.rate_min} min="0" max="100" onChange=${(rate_min) => set({ rate_min })} />
      <${Least} label="Rate to, %" value=${params.rate_max} min="0" max="100" onChange=${(rate_max) => set({ rate_max })} />
      <${Least} label="AUROC from" value=${params.auroc} min="0" max="1" onChange=${(auroc) => set({ auroc })} />
    </form>`;
  };

  const List = ({ rows, params }) => {
    const grid = useRef(null);
    const [count, setCount] = useState(null);
    const set = (change) => MFN.go("features", { ...MFN.route.params, ...change }, { replace: true });
    const passes = useMemo(() => filter(params), FILTERS.map((name) => params[name]));
    const first = () => {
      if (!grid.current?.getDisplayedRowCount()) return;
      grid.current.ensureIndexVisible(0);
      grid.current.setFocusedCell(0, "name");
    };
    const filtered = FILTERS.some((name) => params[name]);
    const own = MFN.store.site.live ? [] : MFN.ownLabels.file();
    return html`<${Filters} rows=${rows} params=${params} set=${set} onDown=${first} />
      <div class="hits">
        <span role="status">${count === null ? "" : `${MFN.number(count)} of ${MFN.number(rows.length)} features`}</span>
        ${filtered && html`<button type="button" class="button quiet" onClick=${() => MFN.go("features", { sort: params.sort })}>Show all</button>`}
        ${own.length > 0 && html`<button type="button" class="button quiet"
          onClick=${() => MFN.download("labels.json", JSON.stringify(own, null, 1))}>Download my ${own.length === 1 ? "label" : `${own.length} labels`}</button>`}
      </div>
      ${count === 0 && html`<${MFN.Notice} kind="empty">No feature matches. Use fewer words, or <a href=${MFN.link("features")}>show all</a>.<//>`}
      <${MFN.FeatureGrid} rows=${rows} passes=${passes} sort=${params.sort} grid=${grid} onCount=${setCount} onSort=${(sort) => set({ sort })} />`;
  };

  MFN.pages.features = ({ params }) => {
    MFN.useOwnLabels();
    const state = MFN.useLoaded(() => MFN.store.index(), []);
    return html`<${MFN.Heading} title="Features" />
      <${MFN.Loaded} state=${state} what="features">${({ rows }) => html`<${List} rows=${rows} params=${params} />`}<//>`;
  };
})();

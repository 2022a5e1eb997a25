// The table of features: AG Grid draws only the rows that are seen, and brings the keys and the ARIA of a grid.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;

  // Empty values stand last in both directions.
  const compare = (one, other, _node, _other, descending) => {
    const empty = (one === null || one === undefined) - (other === null || other === undefined);
    if (empty) return descending ? -empty : empty;
    return typeof one === "string" ? one.localeCompare(other) : one - other;
  };
  const inOrder = (one, other, { data }, { data: next }) => data.layer - next.layer || data.index - next.index;

  // A cell renderer that returns a text would have it read as HTML; this one returns an element.
  const link = ({ value }) => {
    const anchor = document.createElement("a");
    anchor.href = MFN.link("feature", { name: value });
    anchor.textContent = value;
    anchor.tabIndex = -1; // the grid moves the focus; Enter opens the row
    return anchor;
  };
  const number = ({ value }) => MFN.number(value);
  const tokens = ({ value }) => (value ?? []).map(MFN.visibleToken).join("  ");
  const words = ({ value }) => (value ? MFN.visible(value) : "");

  // from: width of the table, in pixels, from which a column is shown
  const COLUMNS = [
    { field: "name", headerName: "Feature", width: 120, comparator: inOrder, cellRenderer: link, cellClass: "mono" },
    { field: "label", headerName: "Label", minWidth: 140, flex: 3, valueFormatter: words },
    { field: "label_source", headerName: "Source", width: 110, valueFormatter: words, from: 1100 },
    { field: "score", headerName: "Score", width: 90, valueFormatter: number, type: "rightAligned", from: 1250 },
    { field: "auroc", headerName: "AUROC", width: 112, valueFormatter: number, type: "rightAligned", from: 700 },
    { field: "rate", headerName: "Firing rate", width: 130, valueFormatter: ({ value }) => MFN.percent(value), type: "rightAligned" },
    { field: "mean", headerName: "Mean", width: 90, valueFormatter: number, type: "rightAligned", from: 1000 },
    { field: "max", headerName: "Max", width: 90, valueFormatter: number, type: "rightAligned", from: 900 },
    { field: "fires_on", headerName: "Fires on", minWidth: 150, flex: 2, valueFormatter: tokens, cellClass: "mono", from: 560 },
    { field: "promotes", headerName: "Promotes", minWidth: 150, flex: 2, valueFormatter: tokens, cellClass: "mono", from: 800 },
  ];
  const NARROW = { name: { width: 88 }, label: { minWidth: 80 }, rate: { width: 112, headerName: "Rate" } };
  const byTokens = (one, other, ...others) => compare(one?.[0] ?? null, other?.[0] ?? null, ...others);

  MFN.sortable = COLUMNS.map((column) => column.field);

  const theme = () =>
    agGrid.themeQuartz.withParams({
      accentColor: "var(--accent)",
      backgroundColor: "var(--page)",
      borderColor: "var(--line)",
      browserColorScheme: "inherit",
      cellHorizontalPadding: 10,
      columnBorder: false,
      fontFamily: "inherit",
      fontSize: 14,
      foregroundColor: "var(--text)",
      headerBackgroundColor: "var(--surface)",
      headerFontWeight: 600,
      headerTextColor: "var(--text)",
      rowHoverColor: "color-mix(in srgb, var(--shade) 18%, transparent)",
      spacing: 6,
      wrapperBorderRadius: "var(--radius)",
    });

  const columnDefs = (width) =>
    COLUMNS.map(({ from = 0, ...column }) => ({
      comparator: column.cellClass ? byTokens : compare,
      hide: width < from,
      ...column,
      colId: column.field,
      ...(width < 480 ? NARROW[column.field] : {}),
    }));

  // "rate:desc" -> the state of AG Grid
  const sortState = (sort) => {
    const [colId, direction] = (sort ?? "").split(":");
    const known = MFN.sortable.includes(colId) && ["asc", "desc"].includes(direction);
    return { state: known ? [{ colId, sort: direction }] : [], defaultState: { sort: null } };
  };

  let lastOpened = null; // where the focus goes when a person comes back

  const open = (row) => {
    lastOpened = row.name;
    MFN.go("feature", { name: row.name });
  };

  const makeGrid = (place, latest) => {
    const api = agGrid.createGrid(place, {
      theme: theme(),
      columnDefs: columnDefs(place.clientWidth),
      rowData: latest.current.rows,
      getRowId: ({ data }) => data.name,
      defaultColDef: { sortable: true, resizable: true, suppressHeaderMenuButton: true, suppressMovable: true },
      sortingOrder: ["desc", "asc", null],
      animateRows: false,
      rowBuffer: 4,
      ensureDomOrder: true,
      suppressNoRowsOverlay: true,
      isExternalFilterPresent: () => true,
      doesExternalFilterPass: ({ data }) => latest.current.passes(data),
      onModelUpdated: ({ api: grid }) => latest.current.onCount(grid.getDisplayedRowCount()),
      onCellKeyDown: ({ event, data }) => event.key === "Enter" && open(data),
      onRowClicked: ({ event, data }) => !event.target.closest("a") && open(data),
      onCellClicked: ({ event, data }) => {
        if (event.target.closest("a")) lastOpened = data.name;
      },
      onSortChanged: ({ api: grid, source }) => {
        if (source === "api") return;
        const sorted = grid.getColumnState().find((column) => column.sort);
        latest.current.onSort(sorted ? `${sorted.colId}:${sorted.sort}` : "");
      },
    });
    place.querySelector("[role=grid]")?.setAttribute("aria-label", "Features");
    api.applyColumnState(sortState(latest.current.sort));
    const row = MFN.navigated && lastOpened && api.getRowNode(lastOpened);
    if (row && row.rowIndex !== null) {
      api.ensureNodeVisible(row, "middle");
      api.setFocusedCell(row.rowIndex, "name");
    }
    return api;
  };

  // rows: all of them; passes(row): whether it is shown; sort: "rate:desc"; focusSignal: a new value moves the focus here
  MFN.FeatureGrid = ({ rows, passes, sort, onSort, onCount, grid }) => {
    const place = useRef(null);
    const latest = useRef(null);
    const [ready, setReady] = useState(false);
    const [error, setError] = useState(null);
    latest.current = { rows, passes, sort, onSort, onCount };

    useEffect(() => {
      let wanted = true;
      let observer;
      MFN.part("ag_grid").then(
        () => {
          if (!wanted) return;
          grid.current = makeGrid(place.current, latest);
          let shown = "";
          observer = new ResizeObserver(([entry]) => {
            const now = COLUMNS.map(({ from = 0 }) => entry.contentRect.width >= from).join();
            if (now !== shown) grid.current.setGridOption("columnDefs", columnDefs(entry.contentRect.width));
            shown = now;
          });
          observer.observe(place.current);
          setReady(true);
        },
        (failed) => wanted && setError(failed),
      );
      return () => {
        wanted = false;
        observer?.disconnect();
        grid.current?.destroy();
        grid.current = null;
      };
    }, []);
    useEffect(() => {
      if (ready) grid.current.onFilterChanged();
    }, [ready, passes]);
    useEffect(() => {
      if (ready) grid.current.setGridOption("rowData", rows);
    }, [ready, rows]);
    useEffect(() => {
      if (ready) grid.current.applyColumnState(sortState(sort));
    }, [ready, sort]);
    if (error) return html`<${MFN.Notice} kind="error">${error.message}<//>`;
    return html`${!ready && html`<${MFN.Loading} what="the table" />`}<div class="grid" ref=${place}></div>`;
  };
})();

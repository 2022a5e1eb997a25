// Data of the model. A page from disk may not fetch, so each file is a script that hands over one packed text.
"use strict";

(() => {
  const waiting = new Map(); // name -> {resolve, reject, promise}
  const MOST_CHUNKS = 64; // of feature records in memory
  const chunks = new Map();

  const unpack = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  };

  MFN.receive = (name, content) => {
    if (name === "site") MFN.store.site = content;
    else unpack(content).then((value) => waiting.get(name)?.resolve(value), (error) => waiting.get(name)?.reject(error));
  };

  // Runs data/NAME.js, which calls MFN.receive(NAME, ...). A file that failed may be asked for again.
  const load = (name) => {
    if (!waiting.has(name)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      waiting.set(name, entry);
      MFN.run(`data/${name}.js`).catch(entry.reject);
      entry.promise.catch(() => waiting.delete(name));
    }
    return waiting.get(name).promise;
  };

  const rowsOf = (part) =>
    part.layer.map((layer, row) => {
      const at = { name: `L${layer}/${part.index[row]}`, layer };
      for (const [column, values] of Object.entries(part)) at[column] = values[row];
      return at;
    });

  const withOwn = (row) => {
    const own = MFN.ownLabels.all()[row.name];
    if (own === undefined) return row;
    if (own === null) return row.label_source === "human" ? { ...row, label: null, label_source: null } : row;
    return { ...row, label: own.label, label_source: "human", score: own.score ?? null };
  };

  let rows; // promise of the rows as the atlas has them
  let labelled; // {rows, byName} with the person's own labels, and the labels it was made for
  const index = async () => {
    rows ??= Promise.all(Array.from({ length: MFN.store.site.index_parts }, (_, part) => load(`index/${part}`)))
      .then((parts) => parts.flatMap(rowsOf));
    rows.catch(() => {
      rows = undefined;
    });
    const all = await rows;
    const own = MFN.ownLabels.all();
    if (labelled?.own !== own) {
      const merged = Object.keys(own).length ? all.map(withOwn) : all;
      labelled = { own, rows: merged, byName: new Map(merged.map((row) => [row.name, row])) };
    }
    return labelled;
  };

  const chunk = (name) => {
    const promise = chunks.get(name) ?? load(name);
    chunks.delete(name); // and to the end: the oldest goes first
    chunks.set(name, promise);
    promise.catch(() => chunks.delete(name));
    if (chunks.size > MOST_CHUNKS) {
      const [oldest] = chunks.keys();
      chunks.delete(oldest);
      waiting.delete(oldest);
    }
    return promise;
  };

  // A feature as the atlas has it.
  const record = async (name) => {
    const parts = /^L(\d+)\/(\d+)$/.exec(name);
    const layer = parts && MFN.store.site.layers.find((each) => each.layer === Number(parts[1]));
    if (!layer || Number(parts[2]) >= layer.features) throw new Error(`There is no feature ${MFN.visible(name)} in this model.`);
    const records = await chunk(`features/L${layer.layer}/${Math.floor(Number(parts[2]) / MFN.store.site.chunk)}`);
    const found = records.find((each) => each.feature === name);
    if (!found) throw new Error(`The data of this explorer has no feature ${name}.`);
    return found;
  };

  // The same with the person's own label.
  const feature = async (name) => {
    const found = await record(name);
    return { ...found, labels: MFN.ownLabels.merged(name, found.labels) };
  };

  MFN.store = { site: null, index, record, feature, model: () => load("model") };
})();

// Labels that a person wrote: with the atlas if a server is there, in this browser else.
"use strict";

(() => {
  const listeners = new Set();
  let labels = {}; // "L6/12" -> label record, or null if it was removed

  const key = () => `mfn-labels:${MFN.store.site.name}:${MFN.store.site.features_digest ?? ""}`;
  const record = (label) => ({ label, source: "human", score: null });

  const keep = () => {
    const kept = Object.fromEntries(Object.entries(labels).map(([name, each]) => [name, each.label]));
    localStorage.setItem(key(), JSON.stringify(kept));
  };

  const fromBrowser = () => {
    try {
      const kept = JSON.parse(localStorage.getItem(key()) ?? "{}");
      const texts = Object.entries(kept).filter(([, label]) => typeof label === "string" && label);
      return Object.fromEntries(texts.map(([name, label]) => [name, record(label)]));
    } catch {
      return {}; // no storage, or another program wrote there
    }
  };

  const tell = () => {
    for (const listener of listeners) listener(labels);
  };

  MFN.ownLabels = {
    // The server's labels may be newer than the data it wrote when it started.
    load: async () => {
      labels = MFN.store.site.live ? await MFN.api("labels").catch(() => ({})) : fromBrowser();
    },
    all: () => labels,
    save: async (name, text) => {
      const label = text.trim();
      const path = `labels/${name.slice(1)}`;
      if (MFN.store.site.live) {
        const saved = label
          ? await MFN.api(path, { label }, { method: "PUT" })
          : await MFN.api(path, undefined, { method: "DELETE" });
        labels = { ...labels, [name]: label ? { ...record(label), ...saved } : null };
      } else {
        const { [name]: old, ...others } = labels;
        labels = label ? { ...others, [name]: record(label) } : others;
        keep();
      }
      tell();
    },
    // Rows as `mfn atlas --labels FILE.json` reads them.
    file: () =>
      Object.entries(labels)
        .filter(([, each]) => each)
        .map(([feature, each]) => ({ feature, label: each.label, source: "human" })),
    // The labels of a record with the person's own in the place of the atlas's human one.
    merged: (name, others) => {
      if (!(name in labels)) return others;
      const rest = others.filter((each) => each.source !== "human");
      return labels[name] ? [labels[name], ...rest] : rest;
    },
  };

  MFN.useOwnLabels = () => {
    const [current, setCurrent] = MFN.hooks.useState(labels);
    MFN.hooks.useEffect(() => {
      listeners.add(setCurrent);
      return () => listeners.delete(setCurrent);
    }, []);
    return current;
  };
})();

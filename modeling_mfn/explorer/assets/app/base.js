// Names that all other files use: components, hooks, and how numbers are written.
"use strict";

(() => {
  MFN.html = htm.bind(preact.h);
  MFN.hooks = preactHooks;
  MFN.Fragment = preact.Fragment;

  const plain = new Intl.NumberFormat("en");
  const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

  // 1234567 -> "1,234,567"; 0.012345 -> "0.0123"; null -> "–"
  MFN.number = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (Number.isInteger(value)) return plain.format(value);
    const size = Math.abs(value);
    if (size < 1e-4) return value.toExponential(1);
    return size >= 1000 ? plain.format(Math.round(value)) : short.format(value);
  };

  // 0.01234 -> "1.23 %"
  MFN.percent = (share) => (share === null || share === undefined ? "–" : `${MFN.number(share * 100)} %`);

  // Runs a script of this folder; fulfilled once it has run.
  MFN.run = (src) =>
    new Promise((resolve, reject) => {
      const script = Object.assign(document.createElement("script"), { src });
      script.onload = () => {
        script.remove();
        resolve();
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`${src} cannot be read; is the folder complete?`));
      };
      document.head.append(script);
    });

  // Large parts are loaded when a page first needs them: MFN.part("ag_grid"), "d3", "plot".
  const parts = new Map();
  MFN.part = (name) => {
    if (!parts.has(name)) {
      const before = name === "plot" ? MFN.part("d3") : Promise.resolve();
      const loaded = before.then(() => MFN.run(`vendor/${name}.js`));
      loaded.catch(() => parts.delete(name));
      parts.set(name, loaded);
    }
    return parts.get(name);
  };

  // What a promise gives: {value}, {error}, or {} while it is loading.
  MFN.useLoaded = (load, changes) => {
    const [state, setState] = MFN.hooks.useState({});
    MFN.hooks.useEffect(() => {
      let wanted = true;
      setState({});
      Promise.resolve()
        .then(load)
        .then((value) => wanted && setState({ value }), (error) => wanted && setState({ error }));
      return () => {
        wanted = false;
      };
    }, changes);
    return state;
  };
})();

// Components that several pages use.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;

  // The page's h1: names the browser's tab, and takes the focus after a navigation, so that a screen reader tells it.
  MFN.Heading = ({ title, children }) => {
    const heading = useRef(null);
    useEffect(() => {
      document.title = `${title} · ${MFN.store.site?.name ?? "MFN"}`;
      if (MFN.navigated) {
        window.scrollTo(0, 0);
        heading.current.focus({ preventScroll: true });
      }
    }, [title]);
    return html`<h1 tabindex="-1" ref=${heading}>${children ?? title}</h1>`;
  };

  // kind: "info", "error", "empty"
  MFN.Notice = ({ kind = "info", title, children }) => html`
    <div class=${`notice ${kind}`} role=${kind === "error" ? "alert" : "status"}>
      ${title && html`<strong>${title}</strong>`}
      <div>${children}</div>
    </div>`;

  MFN.Loading = ({ what = "data" }) => html`<p class="loading" role="status">Loading ${what} …</p>`;

  // Shows what MFN.useLoaded gave: loading, an error, or children(value).
  MFN.Loaded = ({ state, what, children }) => {
    if (state.error) return html`<${MFN.Notice} kind="error" title="This cannot be shown">${state.error.message}<//>`;
    if (state.value === undefined) return html`<${MFN.Loading} what=${what} />`;
    return children(state.value);
  };

  MFN.NeedsServer = ({ what }) => html`
    <${MFN.Notice} title=${`${what} needs the model`}>
      This folder has the atlas but no model. Start the explorer with <code>mfn explore MODEL</code> to get this page.
    <//>`;

  // A token of running text, shaded by its share 0..1 of the strongest activation.
  MFN.Token = ({ text, share = 0, title, onClick, current = false, alone = false }) => {
    const shown = alone ? MFN.visibleToken(text) : MFN.visibleInText(text);
    const common = {
      class: `token${current ? " current" : ""}${share > 0 ? " active" : ""}`,
      style: { "--share": Math.min(Math.max(share, 0), 1).toFixed(3) },
      title,
    };
    if (onClick) {
      return html`<button type="button" ...${common} aria-current=${current ? "true" : undefined} onClick=${onClick}>${shown}</button>`;
    }
    return html`<span ...${common}>${shown}</span>`;
  };

  const LONGEST = 120; // characters of a label in a list
  const shortened = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text);

  // The name of a feature, with its label, as a link to its page.
  MFN.FeatureLink = ({ name, label }) => {
    const [known, setKnown] = useState(label);
    useEffect(() => {
      let wanted = true;
      if (label !== undefined) setKnown(label);
      else MFN.store.index().then(({ byName }) => wanted && setKnown(byName.get(name)?.label ?? null), () => {});
      return () => {
        wanted = false;
      };
    }, [name, label]);
    return html`<a class="feature-link" href=${MFN.link("feature", { name })}>
      <span class="feature-name">${name}</span>${known && html` <bdi class="feature-label">${shortened(MFN.visible(known))}</bdi>`}
    </a>`;
  };

  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // a page from disk or over plain http has no clipboard of its own in some browsers
      const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true, className: "offscreen" });
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error("the browser refuses to copy");
    }
  };

  MFN.CopyButton = ({ text, label }) => {
    const [state, setState] = useState("");
    const copy = async () => {
      const value = typeof text === "function" ? await text() : text;
      await copied(value).then(() => setState("Copied"), (error) => setState(`Not copied: ${error.message}`));
      setTimeout(() => setState(""), 2000);
    };
    return html`<button type="button" class="button" onClick=${copy}>${label}
      <span class="copied" role="status">${state}</span></button>`;
  };

  // Offers a text as a file.
  MFN.download = (name, text, type = "application/json") => {
    const href = URL.createObjectURL(new Blob([text], { type }));
    const link = Object.assign(document.createElement("a"), { href, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  };
})();

// The frame of every page: header, navigation, theme, shortcuts, and what catches errors.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;
  const NAVIGATION = [
    ["features", "Features"],
    ["text", "Text"],
    ["steer", "Steer"],
    ["why", "Why"],
    ["model", "Model"],
  ];
  const SHORTCUTS = [
    ["/", "search"],
    ["?", "show these shortcuts"],
    ["g then f, t, s, w, m", "go to Features, Text, Steer, Why, Model"],
    ["arrows, Enter", "in the list: move, open a feature"],
    ["j, k", "on a feature: next, previous"],
    ["Escape", "close this"],
  ];

  class Boundary extends preact.Component {
    constructor() {
      super();
      this.state = { error: null };
    }

    componentDidCatch(error) {
      console.error(error);
      this.setState({ error });
    }

    render({ children }, { error }) {
      if (!error) return children;
      return html`<${MFN.Heading} title="An error" />
        <${MFN.Notice} kind="error" title="This page has failed">
          <p>${error.message}</p>
          <button type="button" class="button" onClick=${() => this.setState({ error: null })}>Try again</button>
        <//>`;
    }
  }

  const Theme = () => {
    const [theme, setTheme] = useState(MFN.theme.get());
    const change = (event) => {
      MFN.theme.set(event.target.value);
      setTheme(event.target.value);
    };
    return html`<label class="theme"><span class="offscreen">Theme</span>
      <select value=${theme} onChange=${change}>
        ${MFN.theme.all.map((each) => html`<option key=${each} value=${each}>${each}</option>`)}
      </select></label>`;
  };

  const Navigation = ({ page }) => html`<nav aria-label="Pages"><ul>
    ${NAVIGATION.map(([name, title]) => {
      const here = page === name || (page === "feature" && name === "features");
      return html`<li key=${name}><a href=${MFN.link(name)} aria-current=${here ? "page" : undefined}>${title}</a></li>`;
    })}
  </ul></nav>`;

  const Shortcuts = ({ dialog }) => html`<dialog ref=${dialog} aria-labelledby="shortcuts-title">
    <h2 id="shortcuts-title">Shortcuts</h2>
    <dl class="shortcuts">${SHORTCUTS.map(([keys, effect]) => html`<div key=${keys}><dt><kbd>${keys}</kbd></dt><dd>${effect}</dd></div>`)}</dl>
    <form method="dialog"><button class="button">Close</button></form>
  </dialog>`;

  const writes = (target) => target.closest?.("input:not([type=checkbox], [type=range]), textarea, select, [contenteditable]");

  // Keys of the whole explorer. Pages add their own with MFN.useKeys.
  const useShortcuts = (dialog) => {
    const after = useRef("");
    MFN.useKeys((key) => {
      const jump = after.current === "g" && NAVIGATION.find(([name]) => name[0] === key);
      after.current = key;
      if (jump) MFN.go(jump[0]);
      else if (key === "?") dialog.current.showModal();
      else if (key === "/") {
        const search = document.querySelector("[data-search]");
        if (search) search.focus();
        else MFN.go("features");
      } else return false;
      return true;
    });
  };

  const Shell = () => {
    const { page, params } = MFN.useRoute();
    const dialog = useRef(null);
    const Page = MFN.pages[page];
    useShortcuts(dialog);
    const skip = (event) => {
      event.preventDefault(); // the hash is the route
      document.getElementById("main").focus();
    };
    const site = MFN.store.site;
    return html`<a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
      <header class="top">
        <a class="brand" href=${MFN.link("model")} title="About the model"><bdi>${site.name}</bdi></a>
        <${Navigation} page=${page} />
        <div class="tools">
          <button type="button" class="button quiet" aria-haspopup="dialog" aria-label="Keyboard shortcuts" onClick=${() => dialog.current.showModal()}>?</button>
          <${Theme} />
        </div>
      </header>
      <main id="main" tabindex="-1" class=${`page-${page}`}><${Boundary} key=${page}><${Page} key=${page} params=${params} /><//></main>
      <${Shortcuts} dialog=${dialog} />`;
  };

  // onKey(key, event) -> true if it has used the key. Keys in fields, and with Ctrl, Alt or Meta, are not told.
  MFN.useKeys = (onKey) => {
    const latest = useRef(onKey);
    latest.current = onKey;
    useEffect(() => {
      const listener = (event) => {
        if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || writes(event.target)) return;
        if (document.querySelector("dialog[open]")) return;
        if (latest.current(event.key, event)) event.preventDefault();
      };
      document.addEventListener("keydown", listener);
      return () => document.removeEventListener("keydown", listener);
    }, []);
  };

  const start = async () => {
    const root = document.getElementById("app");
    if (!MFN.store.site) {
      root.replaceChildren();
      preact.render(html`<main id="main"><${MFN.Notice} kind="error" title="The data is missing">
        data/site.js cannot be read. Make the folder anew with <code>mfn explore MODEL --static OUT</code>.<//></main>`, root);
      return;
    }
    await MFN.ownLabels.load();
    root.replaceChildren();
    preact.render(html`<${Shell} />`, root);
  };

  start();
})();

// Sets the stored theme before the first paint, so that a dark page never flashes white.
"use strict";

window.MFN = { pages: {} };

(() => {
  const KEY = "mfn-theme";
  const THEMES = ["auto", "light", "dark"];

  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // a browser may refuse storage to a page from disk
    }
  };

  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // the theme then lasts as long as the page
    }
  };

  const first = stored();
  document.documentElement.dataset.theme = THEMES.includes(first) ? first : "auto";
  MFN.theme = { all: THEMES, get: () => document.documentElement.dataset.theme, set };
})();

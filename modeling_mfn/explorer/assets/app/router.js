// The address after # is the state of the page: every view has a link that gives it again.
"use strict";

(() => {
  const PAGES = ["features", "feature", "text", "steer", "why", "model"];
  const listeners = new Set();

  // {q: "king", set: ["a", "b"], none: ""} -> "q=king&set=a&set=b"
  const query = (params) => {
    const written = new URLSearchParams();
    for (const [name, value] of Object.entries(params)) {
      for (const each of [value].flat()) {
        if (each !== null && each !== undefined && each !== "") written.append(name, each);
      }
    }
    return written.toString();
  };

  // href of a view. A feature's name is part of the path: MFN.link("feature", {name: "L6/12"}).
  MFN.link = (page, params = {}) => {
    const { name, ...others } = params;
    const path = page === "feature" ? `#/feature/${encodeURI(name)}` : `#/${page}`;
    const rest = query(page === "feature" ? others : params);
    return rest ? `${path}?${rest}` : path;
  };

  // "#/steer?set=a&set=b" -> {page: "steer", params: {set: ["a", "b"]}}; a name that stands once is a text.
  const parse = (hash) => {
    const [path, rest = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
    const [page, ...inner] = path.split("/");
    const params = {};
    for (const [name, value] of new URLSearchParams(rest)) {
      params[name] = name in params ? [params[name], value].flat() : value;
    }
    if (page === "feature") params.name = decodeURI(inner.join("/"));
    return { page: PAGES.includes(page) ? page : "features", params };
  };

  const safely = (hash) => {
    try {
      return parse(hash);
    } catch {
      return { page: "features", params: {} }; // a damaged % in a link
    }
  };

  MFN.route = safely(location.hash);
  MFN.navigated = false; // true once a person went to another view: then headings take the focus

  const changed = (navigated) => {
    MFN.route = safely(location.hash);
    MFN.navigated = navigated;
    for (const listener of listeners) listener(MFN.route);
  };

  // replace: the view writes its own state; no entry in the history, and the focus stays
  MFN.go = (page, params = {}, { replace = false } = {}) => {
    const hash = MFN.link(page, params);
    if (hash === location.hash) return;
    if (replace) {
      history.replaceState(null, "", hash);
      changed(false);
    } else {
      location.hash = hash;
    }
  };

  // Values of a name that may stand several times: MFN.all(params, "set") -> [] or more texts.
  MFN.all = (params, name) => (params[name] === undefined ? [] : [params[name]].flat());

  MFN.useRoute = () => {
    const [route, setRoute] = MFN.hooks.useState(MFN.route);
    MFN.hooks.useEffect(() => {
      listeners.add(setRoute);
      return () => listeners.delete(setRoute);
    }, []);
    return route;
  };

  window.addEventListener("hashchange", () => changed(true));
})();

// Parts that the pages with a model share: their state in the address, requests that can be given up, rows of tokens.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;
  const WRITE_AFTER = 150; // milliseconds; browsers refuse hundreds of new addresses in a few seconds

  // A page that needs a model; from a folder it says which command gives one.
  const page = (title, Page) => ({ params }) =>
    MFN.store.site.live
      ? html`<${Page} params=${params} />`
      : html`<${MFN.Heading} title=${title} /><${MFN.NeedsServer} what=${title} />`;

  // State of a page that also stands in the address: [view, change(changes)]. A followed link replaces it.
  const useView = (name, params) => {
    const [view, setView] = useState(params);
    const latest = useRef(params);
    const written = useRef(MFN.link(name, params));
    const timer = useRef(null);
    const show = (next) => {
      latest.current = next;
      setView(next);
    };
    useEffect(() => {
      const link = MFN.link(name, params);
      if (link === written.current) return;
      clearTimeout(timer.current);
      written.current = link;
      show(params);
    }, [params]);
    useEffect(() => () => clearTimeout(timer.current), []);
    const change = (changes) => {
      show({ ...latest.current, ...changes });
      clearTimeout(timer.current);
      timer.current = setTimeout(() => {
        written.current = MFN.link(name, latest.current);
        MFN.go(name, latest.current, { replace: true });
      }, WRITE_AFTER);
    };
    return [view, change];
  };

  // The one text of a name in the address; a hand-written address may have several.
  const one = (params, name, otherwise = "") => MFN.all(params, name)[0] ?? otherwise;

  // A whole number within limits, or what to take otherwise.
  const whole = (text, least, most, otherwise) => {
    const value = Number(text);
    if (text === "" || text === undefined || !Number.isInteger(value)) return otherwise;
    return Math.min(Math.max(value, least), most);
  };

  // The answer to a request: {value, error, busy}. New keys give up the running request; the last answer stays
  // visible until the next one comes. ask is null where there is nothing to ask, and undefined while that is not known.
  const useAnswer = (ask, keys, delay = 0) => {
    const [state, setState] = useState({});
    useEffect(() => {
      if (ask === null) return setState({});
      if (!ask) return setState((last) => ({ value: last.value, busy: true }));
      const controller = new AbortController();
      const tell = (next) => !controller.signal.aborted && setState(next);
      setState((last) => ({ value: last.value, busy: true }));
      const timer = setTimeout(() => {
        Promise.resolve(controller.signal).then(ask).then((value) => tell({ value }), (error) => tell({ error }));
      }, delay);
      return () => {
        clearTimeout(timer);
        controller.abort();
      };
    }, keys);
    return state;
  };

  const Failure = ({ error, title = "The model refused" }) =>
    error ? html`<${MFN.Notice} kind="error" title=${title}>${MFN.visible(error.message)}<//>` : null;

  // "+0.42": a number with its sign, short enough for a picture.
  const signed = (value, digits = 2) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && size < 10 ** -digits ? String(Number(size.toPrecision(2))) : size.toFixed(digits);
    return `${value < 0 ? "−" : "+"}${text}`;
  };

  const KEYS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };

  // Tokens of a text, one of which is chosen, by mouse or with arrow keys.
  const TokenPicker = ({ tokens, shares, chosen, onPick, label }) => {
    const list = useRef(null);
    const move = (event) => {
      const places = { Home: 0, End: tokens.length - 1 };
      const at = [...list.current.children].indexOf(event.target); // `chosen` may be one key behind
      const next = event.key in KEYS ? at + KEYS[event.key] : places[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const place = Math.min(Math.max(next, 0), tokens.length - 1);
      onPick(place);
      list.current.children[place].focus();
    };
    return html`<div class="tokens token-picker" role="listbox" aria-label=${label} aria-orientation="horizontal" ref=${list} onKeyDown=${move}>
      ${tokens.map((text, at) => html`<span key=${at} role="option" aria-selected=${at === chosen} tabindex=${at === chosen ? 0 : -1}
        class=${`token${at === chosen ? " current" : ""}${shares?.[at] > 0 ? " active" : ""}`}
        style=${{ "--share": Math.min(shares?.[at] ?? 0, 1).toFixed(3) }} title=${`token ${at}`}
        onClick=${() => onPick(at)}>${MFN.visibleInText(text)}</span>`)}
    </div>`;
  };

  let session; // promise of what the server allows
  const useSession = () =>
    MFN.useLoaded(() => {
      session ??= MFN.api("session");
      session.catch(() => (session = undefined));
      return session;
    }, []);

  MFN.live = { page, useView, one, whole, useAnswer, useSession, Failure, TokenPicker, signed };
})();

// A box that suggests features while a person types a label, a token or a name (ARIA: combobox with a listbox).
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;
  const MOST = 12;
  let pickers = 0;

  const Option = ({ id, row, chosen, onPick }) => {
    const pick = (event) => {
      event.preventDefault(); // or the box loses the focus before the click comes
      onPick(row);
    };
    return html`<li id=${id} role="option" aria-selected=${chosen} class=${chosen ? "chosen" : ""} onMouseDown=${pick}>
      <span class="feature-name">${row.name}</span>
      <bdi class="feature-label">${row.label ? MFN.visible(row.label) : "no label"}</bdi>
      <span class="faint">${(row.fires_on ?? []).map(MFN.visibleToken).join("  ")}</span>
    </li>`;
  };

  // onPick(name, row) gets the feature that was chosen.
  MFN.FeaturePicker = ({ onPick, label = "Feature", placeholder = "label, token or L6/12" }) => {
    const [id] = useState(() => `picker-${(pickers += 1)}`);
    const [text, setText] = useState("");
    const [hits, setHits] = useState([]);
    const [open, setOpen] = useState(false);
    const [chosen, setChosen] = useState(0);
    const list = useRef(null);

    useEffect(() => {
      let wanted = true;
      if (!text.trim()) setHits([]);
      else {
        MFN.store.index().then(
          ({ rows }) => {
            if (!wanted) return;
            setHits(MFN.search.best(rows, text, MOST));
            setChosen(0);
          },
          () => {},
        );
      }
      return () => {
        wanted = false;
      };
    }, [text]);
    useEffect(() => list.current?.children[chosen]?.scrollIntoView({ block: "nearest" }), [chosen, open]);

    const pick = (row) => {
      setText("");
      setOpen(false);
      onPick(row.name, row);
    };
    const shown = open && hits.length > 0;
    const keys = {
      ArrowDown: () => (shown ? setChosen((chosen + 1) % hits.length) : setOpen(true)),
      ArrowUp: () => shown && setChosen((chosen + hits.length - 1) % hits.length),
      Enter: () => shown && pick(hits[chosen]),
      Escape: () => setOpen(false),
    };
    const onKeyDown = (event) => {
      if (!keys[event.key]) return;
      if (event.key !== "Escape" || shown) event.preventDefault();
      keys[event.key]();
    };
    const onInput = (event) => {
      setText(event.target.value);
      setOpen(true);
    };
    const told = text.trim() && open ? `${hits.length === MOST ? `${MOST} or more` : hits.length} features` : "";
    return html`<div class="picker">
      <label for=${id}>${label}</label>
      <input id=${id} type="text" role="combobox" autocomplete="off" spellcheck=${false} value=${text} placeholder=${placeholder}
        aria-expanded=${shown} aria-controls=${`${id}-list`} aria-autocomplete="list"
        aria-activedescendant=${shown ? `${id}-${chosen}` : undefined}
        onInput=${onInput} onKeyDown=${onKeyDown} onBlur=${() => setOpen(false)} />
      <ul id=${`${id}-list`} role="listbox" aria-label=${label} hidden=${!shown} ref=${list}>
        ${shown && hits.map((row, at) => html`<${Option} key=${row.name} id=${`${id}-${at}`} row=${row} chosen=${at === chosen} onPick=${pick} />`)}
      </ul>
      <span class="offscreen" role="status">${told}</span>
    </div>`;
  };
})();

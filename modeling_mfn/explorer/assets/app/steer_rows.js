// Rows of interventions: what is steered, how, and how strongly, in multiples of the typical activation.
"use strict";

(() => {
  const { html } = MFN;
  const { useState } = MFN.hooks;
  const { KINDS, isFeature, featuresOf, typicalOf, multiplesOf } = MFN.interventions;
  const LISTED = 12; // features of a label that are named

  // A number field keeps what is being typed, such as "2." or "-", until it is left.
  const NumberField = ({ value, onNumber, ...others }) => {
    const [draft, setDraft] = useState(null);
    const type = (event) => {
      setDraft(event.target.value);
      if (Number.isFinite(event.target.valueAsNumber)) onNumber(event.target.valueAsNumber);
    };
    return html`<input type="number" ...${others} value=${draft ?? value} onInput=${type} onBlur=${() => setDraft(null)} />`;
  };

  // What one unit of the slider is, for a row: {unit, text}. A feature that never fired has no typical activation.
  const unitOf = (row, records) => {
    if (!KINDS[row.kind].typical) return { unit: 1, text: "×" };
    if (!isFeature(row.target)) return { unit: 1, text: "× typical" };
    const typical = typicalOf(records[0]);
    return typical === null ? { unit: 1, text: "in units of activation" } : { unit: typical, text: "× typical" };
  };

  const Condition = ({ when, above }) => when && html`<span class="faint condition">only where ${when} is above ${MFN.number(above)}</span>`;

  const Strength = ({ row, records, onChange }) => {
    const { range, typical } = KINDS[row.kind];
    const { unit, text } = unitOf(row, records);
    const times = Number((row.value / unit).toFixed(3));
    const set = (value) => onChange({ ...row, value: value * unit });
    const name = `Strength of ${row.target}`;
    const inUnits = typical && isFeature(row.target) && multiplesOf(row, records[0]) !== null;
    return html`<span class="strength">
      <input type="range" min=${range[0]} max=${range[1]} step="0.1" value=${times} aria-label=${name}
        aria-valuetext=${`${times} ${text}`} onInput=${(event) => set(event.target.valueAsNumber)} />
      <${NumberField} step="any" value=${times} aria-label=${`${name}, as a number`} onNumber=${set} />
      <span class="faint">${text}${inUnits ? ` = ${MFN.number(row.value)}` : ""}</span>
      <${Condition} ...${row} />
    </span>`;
  };

  // A feature, or all features of a label. A feature with a shared label can stand for the label.
  const Target = ({ row, records, index, onChange }) => {
    if (!isFeature(row.target)) {
      return html`<details class="label-target"><summary><bdi>${MFN.visible(row.target)}</bdi> <span class="faint">${records.length} features</span></summary>
        ${records.slice(0, LISTED).map(({ name }) => html`<a key=${name} class="feature-name" href=${MFN.link("feature", { name })}>${name}</a> `)}
        ${records.length > LISTED && `and ${records.length - LISTED} more`}</details>`;
    }
    const label = records[0].label;
    const others = label ? featuresOf(label, index).length : 0;
    return html`<span><${MFN.FeatureLink} name=${row.target} />
      ${others > 1 && html` <button type="button" class="button small" onClick=${() => onChange(asLabel(row, label, records[0]))}>All ${others} with this label</button>`}</span>`;
  };

  const asLabel = (row, label, record) => ({ ...row, target: label.trim(), value: multiplesOf(row, record) ?? KINDS[row.kind].start });

  const asKind = (row, kind, records) => {
    const { unit } = unitOf({ ...row, kind }, records);
    return { ...row, kind, value: KINDS[kind].start === null ? null : KINDS[kind].start * unit };
  };

  const Row = ({ row, index, onChange, onRemove }) => {
    let records;
    try {
      records = featuresOf(row.target, index);
    } catch (error) {
      return html`<li class="steer-row"><${MFN.Notice} kind="error">${MFN.visible(error.message)}<//>
        <button type="button" class="button" onClick=${onRemove}>Remove</button></li>`;
    }
    const kind = (event) => onChange(asKind(row, event.target.value, records));
    return html`<li class="steer-row">
      <${Target} row=${row} records=${records} index=${index} onChange=${onChange} />
      <select aria-label=${`Kind of intervention on ${row.target}`} value=${row.kind} onChange=${kind}>
        ${Object.entries(KINDS).map(([name, each]) => html`<option key=${name} value=${name}>${each.name}</option>`)}
      </select>
      ${row.kind === "ablate" ? html`<span class="strength faint">sets it to 0 <${Condition} ...${row} /></span>` : html`<${Strength} row=${row} records=${records} onChange=${onChange} />`}
      <button type="button" class="button" aria-label=${`Remove ${row.target}`} onClick=${onRemove}>Remove</button>
    </li>`;
  };

  // A new row for a feature: clamped to a multiple of its typical activation.
  const rowFor = (name, index) => {
    const record = index.byName.get(name);
    return asKind({ target: name, when: null, above: 0 }, "clamp", [record]);
  };

  // onRows(rows) gets all rows when one of them has changed.
  const SteerRows = ({ rows, index, onRows }) => {
    const add = (name) => {
      if (!rows.some((row) => row.target === name)) onRows([...rows, rowFor(name, index)]);
    };
    const put = (at, row) => onRows(rows.map((each, other) => (other === at ? row : each)));
    return html`<${MFN.FeaturePicker} label="Add a feature" onPick=${add} />
      ${rows.length === 0 && html`<p class="faint">Nothing is steered yet. Add a feature, or load a preset.</p>`}
      <ul class="steer-rows">${rows.map((row, at) => html`<${Row} key=${row.target} row=${row} index=${index}
        onChange=${(next) => put(at, next)} onRemove=${() => onRows(rows.filter((_, other) => other !== at))} />`)}</ul>`;
  };

  Object.assign(MFN.live, { SteerRows, NumberField });
})();

// Presets of the model: load, save under a name, delete.
"use strict";

(() => {
  const { html } = MFN;
  const { useState } = MFN.hooks;

  const address = (name) => `presets/${encodeURIComponent(name)}`;

  const Choose = ({ presets, chosen, onChoose, onLoad, onDelete, writable }) => html`<div class="buttons">
    <label>Preset <select value=${chosen} onChange=${(event) => onChoose(event.target.value)}>
      <option value="">–</option>
      ${Object.keys(presets).map((name) => html`<option key=${name} value=${name}>${MFN.visible(name)}</option>`)}
    </select></label>
    <button type="button" class="button" disabled=${!chosen} onClick=${onLoad}>Load</button>
    ${writable && html`<button type="button" class="button" disabled=${!chosen} onClick=${onDelete}>Delete</button>`}
  </div>`;

  const Save = ({ disabled, onSave }) => {
    const [name, setName] = useState("");
    const save = (event) => {
      event.preventDefault();
      onSave(name.trim());
    };
    return html`<form class="buttons" onSubmit=${save}>
      <label>Name <input type="text" value=${name} onInput=${(event) => setName(event.target.value)} autocomplete="off" /></label>
      <button class="button" disabled=${disabled || !name.trim()}>Save as a preset</button>
    </form>`;
  };

  // current() gives {interventions, positions} of the page; onLoad(preset) puts a preset there.
  MFN.live.Presets = ({ session, current, empty, onLoad }) => {
    const [changes, setChanges] = useState(0);
    const [chosen, setChosen] = useState("");
    const [state, setState] = useState({});
    const presets = MFN.useLoaded(() => MFN.api("presets"), [changes]);
    const change = async (work, told) => {
      setState({});
      await work().then(() => setState({ told }), (error) => setState({ error }));
      setChanges((count) => count + 1);
    };
    const save = (name) =>
      change(async () => {
        await MFN.api(address(name), current(), { method: "PUT" });
        setChosen(name);
      }, `Saved as ${MFN.visible(name)}`);
    const remove = () =>
      change(async () => {
        await MFN.api(address(chosen), undefined, { method: "DELETE" });
        setChosen("");
      }, `Deleted ${MFN.visible(chosen)}`);
    const known = presets.value ?? {};
    const writable = session?.writable ?? false;
    return html`<section class="panel" aria-label="Presets"><h2>Presets</h2>
      <${MFN.live.Failure} error=${presets.error} title="Presets cannot be read" />
      <${Choose} presets=${known} chosen=${chosen in known ? chosen : ""} onChoose=${setChosen} writable=${writable}
        onLoad=${() => onLoad(known[chosen])} onDelete=${remove} />
      ${writable
        ? html`<${Save} disabled=${empty} onSave=${save} />`
        : session && html`<p class="faint">Presets are saved in a model's folder; this model is not in one that can be changed.</p>`}
      <${MFN.live.Failure} error=${state.error} title="The preset was not changed" />
      <p class="faint" role="status">${state.told ?? ""}</p>
    </section>`;
  };
})();

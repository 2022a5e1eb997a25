// Interventions as the pages write them: settings in the syntax of `mfn steer --set`, features of labels, copies as code.
//
// A value for a feature is in units of activation. A value for a label is a multiple of each feature's typical activation.
"use strict";

(() => {
  const KINDS = {
    clamp: { name: "clamp to", field: "value", typical: true, range: [-2, 10], start: 4 },
    add: { name: "add", field: "value", typical: true, range: [-10, 10], start: 2 },
    scale: { name: "scale by", field: "factor", typical: false, range: [-2, 5], start: 2 },
    ablate: { name: "ablate", field: null, typical: false, range: null, start: null },
  };
  const SETTING = /^([^]+)=(?:(clamp|add|scale):([^@]+)|ablate)(?:@(L[0-9]+\/[0-9]+)(?:>([0-9.e+-]+))?)?$/;
  const FEATURE = /^L[0-9]+\/[0-9]+$/;
  const CONTROL_TRIES = 60; // seeds tried until a random feature is not one of those steered

  const isFeature = (target) => FEATURE.test(target);
  const rounded = (value) => Number(value.toPrecision(6));

  // Reads one setting, such as L6/12=clamp:4@L5/3.
  function readSetting(text) {
    const match = SETTING.exec(text);
    const value = match && match[2] ? Number(match[3]) : null;
    if (!match || (match[2] && (!match[3].trim() || !Number.isFinite(value))))
      throw new Error(`"${text}" is not a setting; write L6/12=clamp:4, =add:2, =scale:0.5 or =ablate`);
    return { target: match[1], kind: match[2] || "ablate", value, when: match[4] || null, above: Number(match[5] || 0) };
  }

  function writeSetting({ target, kind, value, when, above }) {
    const change = kind === "ablate" ? "ablate" : `${kind}:${rounded(value)}`;
    const condition = when ? `@${when}${above ? `>${above}` : ""}` : "";
    return `${target}=${change}${condition}`;
  }

  // Rows of a preset, or of any interventions as JSON.
  function readInterventions(interventions) {
    return Object.entries(interventions).map(([target, each]) => {
      const field = KINDS[each.kind].field;
      return { target, kind: each.kind, value: field && each[field], when: each.when || null, above: each.above || 0 };
    });
  }

  function writeIntervention({ kind, value, when, above }) {
    const field = KINDS[kind].field;
    return { kind, ...(field && { [field]: rounded(value) }), ...(when && { when, above: above || 0 }) };
  }

  // Features that a target stands for: itself, or all features with this label that are not pruned.
  function featuresOf(target, index) {
    if (isFeature(target)) {
      const record = index.byName.get(target);
      if (!record) throw new Error(`${target} is not a feature of this model`);
      return [record];
    }
    const wanted = target.trim().toLowerCase();
    const found = index.rows.filter((row) => row.label && row.label.trim().toLowerCase() === wanted);
    const there = found.filter((row) => row.status !== "pruned");
    if (!there.length)
      throw new Error(found.length ? `all features labelled "${target}" are pruned` : `no feature is labelled "${target}"`);
    return there;
  }

  const typicalOf = (record) => (record.mean > 0 ? record.mean : null);

  // Multiples of the typical activation that a row's value is, for a feature; null where there is no typical one.
  function multiplesOf(row, record) {
    if (!KINDS[row.kind].typical || !isFeature(row.target)) return row.value;
    return typicalOf(record) === null ? null : row.value / typicalOf(record);
  }

  // One entry per feature: {record, row, value}. A feature named on its own keeps its own row, whatever its labels.
  function expand(rows, index) {
    const entries = new Map();
    for (const row of [...rows].sort((a, b) => isFeature(b.target) - isFeature(a.target))) {
      for (const record of featuresOf(row.target, index)) {
        const earlier = entries.get(record.name);
        if (earlier && isFeature(earlier.row.target) && !isFeature(row.target)) continue;
        if (earlier) throw new Error(`${record.name} is meant by "${earlier.row.target}" and by "${row.target}"`);
        entries.set(record.name, { record, row, value: valueFor(row, record) });
      }
    }
    return [...entries.values()];
  }

  function valueFor(row, record) {
    if (isFeature(row.target) || !KINDS[row.kind].typical) return row.value;
    if (typicalOf(record) === null)
      throw new Error(`${record.name} of "${row.target}" is never active in the atlas, so it has no typical activation`);
    return row.value * typicalOf(record);
  }

  const asJson = (entries) =>
    Object.fromEntries(entries.map(({ record, row, value }) => [record.name, writeIntervention({ ...row, value })]));

  // The same interventions on random features of nearly equal rate; values keep their multiple of the typical one.
  async function controlFor(entries, index, seed, signal) {
    const taken = new Set(entries.map((entry) => entry.record.name));
    const found = [];
    for (const entry of entries) {
      const record = await randomFeature(entry.record, index, seed, taken, signal);
      taken.add(record.name);
      const own = typicalOf(entry.record);
      const scaled = KINDS[entry.row.kind].typical && own !== null && typicalOf(record) !== null;
      found.push({ ...entry, record, of: entry.record, value: scaled ? (entry.value / own) * record.mean : entry.value });
    }
    return found;
  }

  async function randomFeature(record, index, seed, taken, signal) {
    for (let tried = 0; tried < CONTROL_TRIES; tried++) {
      const query = new URLSearchParams({ feature: record.name, seed: seed + tried });
      const { feature } = await MFN.api(`control?${query}`, undefined, { signal });
      if (!taken.has(feature)) return index.byName.get(feature);
    }
    throw new Error(`no other feature fires about as often as ${record.name}`);
  }

  const shellWord = (text) => (/^[A-Za-z0-9_./:=@,+-]+$/.test(text) && text ? text : `'${text.replaceAll("'", "'\\''")}'`);

  // The command of the same generation; null where its syntax has no way to say it.
  function asCommand(model, rows, { prompt, positions, max, sample, seed }) {
    if (rows.some((row) => row.above)) return null;
    const words = ["mfn", "steer", shellWord(model)];
    for (const row of rows) words.push("--set", shellWord(writeSetting(row)));
    if (positions !== "all") words.push("--positions", positions);
    words.push("--max-new-tokens", String(max));
    if (sample) words.push("--sample", "--seed", String(seed));
    if (prompt.startsWith("-")) words.push("--");
    return [...words, shellWord(prompt)].join(" ");
  }

  // Python lines; a text of JSON with these values is the same text in Python.
  function asPython(entries, { prompt, positions, max, sample, seed, temperature }) {
    const lines = Object.entries(asJson(entries)).map(([name, each]) => `    ${JSON.stringify(name)}: ${JSON.stringify(each)},`);
    const sampling = sample ? `, do_sample=True, temperature=${temperature}` : ", do_sample=False";
    return [
      `inputs = tokenizer(${JSON.stringify(prompt)}, return_tensors="pt")`,
      "interventions = {",
      ...lines,
      "}",
      ...(sample ? [`torch.manual_seed(${seed})`] : []),
      `with model.steer(interventions, positions="${positions}"):`,
      `    tokens = model.generate(**inputs, max_new_tokens=${max}${sampling})`,
      "print(tokenizer.decode(tokens[0]))",
    ].join("\n");
  }

  // Marks the items of two lists that are not in their longest common subsequence: [marks of a, marks of b].
  function differing(a, b) {
    const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    const marks = [a.map(() => true), b.map(() => true)];
    for (let i = 0, j = 0; i < a.length && j < b.length; ) {
      if (a[i] === b[j]) marks[0][i++] = marks[1][j++] = false;
      else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
      else j++;
    }
    return marks;
  }

  MFN.interventions = {
    KINDS, isFeature, readSetting, writeSetting, readInterventions, featuresOf, typicalOf, multiplesOf, expand, asJson,
    controlFor, asCommand, asPython, differing,
  };
})();

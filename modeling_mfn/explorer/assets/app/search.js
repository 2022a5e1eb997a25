// Which features a query means, and which come first.
"use strict";

(() => {
  const haystacks = new WeakMap(); // row -> its words in lower case

  const haystack = (row) => {
    if (!haystacks.has(row)) {
      const words = [row.name, row.label ?? "", ...(row.fires_on ?? []), ...(row.promotes ?? [])];
      haystacks.set(row, words.join("\n").toLowerCase());
    }
    return haystacks.get(row);
  };

  // Every word of the query must stand in the name, the label, or a token of a feature.
  const matcher = (query) => {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    return (row) => words.every((word) => haystack(row).includes(word));
  };

  const rank = (row, text) => {
    const label = (row.label ?? "").toLowerCase();
    if (row.name.toLowerCase() === text) return 0;
    if (label.startsWith(text)) return 1;
    if (label.includes(text)) return 2;
    if ((row.fires_on ?? []).some((token) => token.trim().toLowerCase() === text)) return 3;
    return row.label ? 4 : 5;
  };

  // The `most` best rows for what a person types in a small box; the more frequent one first among equals.
  const best = (rows, query, most) => {
    const text = query.trim().toLowerCase();
    const hits = rows.filter(matcher(query)).map((row) => ({ row, rank: rank(row, text) }));
    hits.sort((one, other) => one.rank - other.rank || (other.row.rate ?? 0) - (one.row.rate ?? 0));
    return hits.slice(0, most).map((hit) => hit.row);
  };

  MFN.search = { matcher, best };
})();

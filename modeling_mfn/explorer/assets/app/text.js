// Text of models and people, made safe to read: what is invisible is shown.
"use strict";

(() => {
  const NAMED = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u0000": "␀", "\u00a0": "⍽", "\u007f": "␡" };
  // a joiner inside an emoji is part of what is seen; anywhere else it hides
  const HIDDEN = /(?<![\p{Extended_Pictographic}\p{Emoji_Modifier}\uFE0F](?=\u200d\p{Extended_Pictographic}))[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cn}\p{Co}\p{Cs}\u00a0\u115f\u1160\u3164]/gu;
  const MARKS = /(\p{M}{4})\p{M}+/gu;

  const named = (character) =>
    NAMED[character] ?? `‹${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;

  // Control and format characters become visible; piled-up accents are cut. Spaces stay.
  MFN.visible = (text) => String(text).replace(MARKS, "$1…").replace(HIDDEN, named);

  // A token on its own: outer spaces become visible, too, because " king" and "king" are two tokens.
  MFN.visibleToken = (text) =>
    MFN.visible(text).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "∅";

  // A token in running text: a space before a word reads better as a space.
  MFN.visibleInText = (text) => (/^ +$/.test(text) ? "␣".repeat(text.length) : MFN.visible(text));
})();

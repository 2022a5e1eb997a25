// An SVG of the page as a file of its own: colours and fonts of the style sheet are written into it.
"use strict";

(() => {
  const PROPERTIES = [
    "fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight", "text-anchor",
  ];
  const KEPT = new Set([
    "x", "y", "x1", "x2", "y1", "y2", "rx", "d", "width", "height", "viewBox", "overflow", "data-part", "data-value", "data-layer",
    "data-feature", "data-weight", "data-from",
  ]);
  const SVG = "http://www.w3.org/2000/svg";

  // XML has no way to write these characters.
  const writable = (text) => text.replace(/[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu, "\uFFFD");

  const copyOf = (element) => {
    const copy = document.createElementNS(SVG, element.localName === "a" ? "g" : element.localName);
    for (const { name, value } of element.attributes) if (KEPT.has(name)) copy.setAttribute(name, writable(value));
    if (!["title", "desc"].includes(element.localName)) {
      const style = getComputedStyle(element);
      for (const name of PROPERTIES) copy.setAttribute(name, style.getPropertyValue(name));
    }
    for (const child of element.childNodes) {
      if (child.nodeType === Node.TEXT_NODE) copy.append(writable(child.data));
      else if (child.nodeType === Node.ELEMENT_NODE) copy.append(copyOf(child));
    }
    return copy;
  };

  MFN.svgFile = (svg) => `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(copyOf(svg))}\n`;
})();

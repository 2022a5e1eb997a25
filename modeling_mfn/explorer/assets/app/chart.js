// A chart of Observable Plot: an SVG with a title and a description.
"use strict";

(() => {
  const { html } = MFN;
  const { useEffect, useRef, useState } = MFN.hooks;
  let charts = 0;

  const described = (svg, title, description, id) => {
    const make = (name, text, suffix) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      element.id = `${id}-${suffix}`;
      element.textContent = text;
      return element;
    };
    svg.prepend(make("title", title, "title"), make("desc", description, "desc"));
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-labelledby", `${id}-title`);
    svg.setAttribute("aria-describedby", `${id}-desc`);
    // the chart is one picture to a screen reader: what is inside it stands in the description
    for (const inner of svg.querySelectorAll("[aria-label]")) inner.removeAttribute("aria-label");
  };

  // options(width): options of Plot.plot for a width in pixels; it is drawn anew when the place changes its width
  // or a value of `changes` differs. The place is `height` pixels high before it is drawn.
  MFN.Chart = ({ title, description, options, height = 180, changes = [] }) => {
    const [id] = useState(() => `chart-${(charts += 1)}`);
    const place = useRef(null);
    const [width, setWidth] = useState(0);
    useEffect(() => {
      const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
      observer.observe(place.current);
      return () => observer.disconnect();
    }, []);
    useEffect(() => {
      if (!width) return undefined;
      let wanted = true;
      MFN.part("plot").then(
        () => {
          if (!wanted) return;
          const svg = Plot.plot({ width, height, ...options(width) });
          described(svg, title, description, id);
          place.current.replaceChildren(svg);
        },
        (error) => wanted && place.current.replaceChildren(error.message),
      );
      return () => {
        wanted = false;
      };
    }, [width, title, description, ...changes]);
    return html`<div class="chart" style=${{ "--chart-height": `${height}px` }} ref=${place}></div>`;
  };
})();

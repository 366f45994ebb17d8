// Draws plotly figures with the plotly.min.js that lies beside this file, when they come near the screen, in the page's own colours.
(() => {
  const here = document.currentScript.src.replace(/kilobench\.js.*$/, "");
  const blocks = [...document.querySelectorAll(".kb-plotly")];
  if (!blocks.length) return;
  let loading;
  const plotly = () => loading ||= new Promise((done, failed) => {
    const script = document.createElement("script");
    Object.assign(script, { src: here + "plotly.min.js", onload: () => done(window.Plotly), onerror: failed });
    document.head.append(script);
  });
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    return { paper_bgcolor: "rgba(0,0,0,0)", font: { color: style.getPropertyValue("--pst-color-text-base").trim() } };
  };
  const draw = async (block) => {
    const figure = JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(block.dataset.figure), (c) => c.charCodeAt(0))));
    const P = await plotly();
    block.replaceChildren();
    P.newPlot(block, figure.data, { ...figure.layout, ...colours(), autosize: true, width: undefined }, { responsive: true, displaylogo: false });
    block.dataset.drawn = "yes";
  };
  const near = new IntersectionObserver((seen) => seen.filter((s) => s.isIntersecting).forEach((s) => { near.unobserve(s.target); draw(s.target); }), { rootMargin: "400px" });
  blocks.forEach((b) => near.observe(b));
  new MutationObserver(() => blocks.filter((b) => b.dataset.drawn).forEach((b) => window.Plotly.relayout(b, colours())))
    .observe(document.documentElement, { attributeFilter: ["data-theme"] });
})();

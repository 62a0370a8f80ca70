"use strict";
// A cross-hair with the values of all curves at the nearest step.
const most = 12;
function shown(value, kind) {
  if (kind === "percent") return (100 * value).toPrecision(3) + "%";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || kind === "power")) return value.toExponential(2);
  return size >= 1e4 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(5)));
}
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), cross = svg.querySelector(".cross");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = ((event.clientX - box.left) * scale - data.left) / (data.right - data.left);
    const x = data.low + Math.min(1, Math.max(0, at)) * (data.high - data.low);
    const found = data.curves.map(([name, color, points]) => [name, color, nearest(points, x)]);
    const step = found.reduce((best, one) => (Math.abs(one[2][0] - x) < Math.abs(best - x) ? one[2][0] : best), Infinity);
    const near = found.filter((one) => Math.abs(one[2][0] - step) <= 0.04 * (data.high - data.low));
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = "step " + step.toLocaleString("en-US");
    tip.append(head);
    const gap = Math.ceil(near.length / most);
    near.filter((_, i) => i % gap === 0).forEach(([name, color, point]) => {
      const row = document.createElement("span"), dot = document.createElement("i"), value = document.createElement("em");
      dot.style.setProperty("--color", color);
      value.textContent = shown(point[1], data.kind);
      row.append(dot, name, value);
      tip.append(row);
    });
    const place = data.left + ((step - data.low) / (data.high - data.low || 1)) * (data.right - data.left);
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    tip.hidden = false;
    svg.classList.add("hovered");
    const left = svg.offsetLeft || 14, shift = place / scale + left;
    tip.style.top = svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + 6 + "px";
    const width = tip.offsetWidth, room = figure.clientWidth;
    tip.style.left = (shift + 12 + width < room ? shift + 12 : Math.max(4, shift - width - 12)) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    svg.classList.remove("hovered");
  });
}
document.documentElement.dataset.ready = "yes";

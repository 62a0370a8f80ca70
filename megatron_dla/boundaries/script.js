"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const T = data.tokens.length, byId = (id) => document.getElementById(id);
// neighbours differ: the golden angle between hues
const color = (n) => `hsl(${(n * 137.508) % 360} 65% 78%)`;

function drawOverview() {
  const canvas = byId("overview"), rows = data.heads.length;
  const height = Math.max(1, Math.floor(640 / rows));
  canvas.width = T; canvas.height = rows * height;
  const ctx = canvas.getContext("2d");
  data.heads.forEach((head, row) => {
    ctx.fillStyle = head.layer % 2 ? "#2a6fd6" : "#e0642b";
    for (const p of head.start) ctx.fillRect(p, row * height, 1, Math.max(1, height - 1));
  });
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows)));
  };
}

// for every t the slots that live after it, [opened at, its number], oldest first
function* slotsOverTime(head) {
  let live = [], next = 0;
  for (let t = 0; t < T; t++) {
    live = live.filter((n) => head.merged[n] > t);
    if (next < head.start.length && head.start[next] === t) live.push(next++);
    yield live;
  }
}

function drawHistory(head) {
  const canvas = byId("history"), ctx = canvas.getContext("2d");
  canvas.width = canvas.height = T;
  let t = 0;
  for (const live of slotsOverTime(head)) {
    live.forEach((n, i) => {
      const end = i + 1 < live.length ? head.start[live[i + 1]] : t + 1;
      ctx.fillStyle = color(n);
      ctx.fillRect(t, head.start[n], 1, end - head.start[n]);
    });
    t++;
  }
}

function writeText(head) {
  const place = byId("text"), opens = new Map(head.start.map((p, n) => [p, n]));
  place.replaceChildren();
  let slot = -1;
  data.tokens.forEach((piece, t) => {
    const span = document.createElement("span");
    const opened = opens.has(t);
    if (opened) { slot = opens.get(t); span.className = "open"; }
    span.style.background = color(slot);
    const end = head.merged[slot];
    span.title = `token ${t}, score ${head.score[t].toFixed(3)}` +
      (opened ? `; opens a slot, ${end < T ? `which merges at token ${end}` : "which stays"}` : "");
    span.textContent = piece;
    place.append(span);
  });
}

function drawBars(id, values) {
  const most = Math.max(...values, 1e-9);
  byId(id).replaceChildren(...values.map((value, n) => {
    const bar = document.createElement("i");
    bar.style.height = `${100 * value / most}%`;
    bar.title = `slot ${n}: ${value.toPrecision(3)}`;
    return bar;
  }));
}

function show(number) {
  const head = data.heads[number], n = head.counts;
  byId("title").textContent = `Layer ${head.layer}, head ${head.head}: ${n.boundaries} boundaries, ${n.merges} merges`;
  drawHistory(head);
  writeText(head);
  drawBars("sizes", head.size);
  drawBars("weights", head.weight);
  document.querySelectorAll("tr[data-head]").forEach((row, i) => row.classList.toggle("shown", i === number));
}

document.querySelectorAll("tr[data-head]").forEach((row, i) => row.addEventListener("click", () => show(i)));
drawOverview();
show(data.shown);

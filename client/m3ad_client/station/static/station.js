"use strict";
// Everything the page does. The token stays in this tab and goes out as a header that no other site can send.
const id = (name) => document.getElementById(name);
const token = () => sessionStorage.getItem("token");

function askToken() {
  const given = window.prompt("Token of this station (the content of its token_file)");
  if (given) { sessionStorage.setItem("token", given.trim()); showToken(); }
  return given;
}
function showToken() { const button = id("token"); if (button) button.textContent = token() ? "Token is set" : "Enter token"; }
if (id("token")) { id("token").onclick = askToken; showToken(); }

// Faults above every page; the wall is loaded anew when a part was judged.
let last = null;
async function look() {
  try {
    const now = await (await fetch("/api/status")).json();
    id("faults").textContent = Object.entries(now.faults).map(([place, fault]) => `${place}: ${fault.why}`).join("\n");
    const wall = document.querySelector("[data-live]");
    if (wall && last !== null && now.last !== last) {
      const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
      wall.replaceChildren(...page.querySelector("[data-live]").children);
    }
    last = now.last;
  } catch { id("faults").textContent = "the station does not answer"; }
}
look();
setInterval(look, 2000);

// One part: review, keys, slider.
const part = id("part");
if (part) {
  const answer = id("answer");
  const go = (side) => {
    const beside = part.dataset[side];
    if (beside) location.href = `/parts/${beside}?${part.dataset.query}`;
    else answer.textContent = `this is the ${side === "older" ? "oldest" : "newest"} of these parts`;
  };
  const say = async (said) => {
    if (document.body.dataset.writable !== "yes" || (!token() && !askToken())) return;
    const headers = { "Authorization": `Bearer ${token()}`, "Content-Type": "application/json" };
    const told = await fetch(`/api/parts/${part.dataset.id}/review`, { method: "POST", headers, body: JSON.stringify({ said }) });
    if (told.ok) {
      id("said").textContent = `a person said: ${said}`;
      if (part.dataset.older) go("older"); else answer.textContent = "written; that was the last one";
      return;
    }
    if (told.status === 401) { sessionStorage.removeItem("token"); showToken(); }
    answer.textContent = (await told.json()).detail;
  };
  const keys = { g: () => say("good"), d: () => say("defect"), j: () => go("older"), k: () => go("newer"), c: () => id("colours")?.click() };
  for (const button of document.querySelectorAll("[data-said]")) button.onclick = () => say(button.dataset.said);
  for (const button of document.querySelectorAll("[data-go]")) button.onclick = () => go(button.dataset.go);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    keys[event.key]?.();
  });
  const slider = id("slider");
  if (slider) slider.oninput = () => { for (const heat of document.querySelectorAll(".heat")) heat.style.opacity = slider.value / 100; };
}

// The cloud, drawn point by point with a depth buffer: no library and no GPU, 60,000 points in a few milliseconds.
const canvas = id("cloud");
if (canvas) drawCloud(canvas);
async function drawCloud(canvas) {
  const answer = await fetch(canvas.dataset.src);
  if (!answer.ok) return;
  const data = await answer.arrayBuffer();
  const count = new DataView(data).getUint32(0, true);
  const points = new Float32Array(data, 4, 3 * count);
  const colours = [new Uint8Array(data, 4 + 15 * count, 3 * count), new Uint8Array(data, 4 + 12 * count, 3 * count)];
  const width = canvas.width, height = canvas.height, context = canvas.getContext("2d");
  const image = context.createImageData(width, height), depth = new Float32Array(width * height);
  const far = Array.from({ length: Math.ceil(count / 7) }, (_, i) => Math.hypot(points[21 * i], points[21 * i + 1], points[21 * i + 2])).sort((a, b) => a - b);
  let yaw = 0.4, pitch = -0.5, chosen = 0, zoom = 0.45 * width / (far[Math.floor(far.length * 0.98)] || 1);
  function draw() {
    const pixels = new Uint32Array(image.data.buffer), colour = colours[chosen];
    pixels.fill(0xff1b1818);
    depth.fill(Infinity);
    const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
    for (let i = 0; i < count; i++) {
      const x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2];
      const across = cy * x + sy * z, along = cy * z - sy * x;
      const column = Math.round(width / 2 + zoom * across), row = Math.round(height / 2 + zoom * (cp * y - sp * along));
      const away = sp * y + cp * along;
      const packed = 0xff000000 | colour[3 * i + 2] << 16 | colour[3 * i + 1] << 8 | colour[3 * i];
      for (let r = row; r < row + 2; r++) for (let c = column; c < column + 2; c++) {
        if (r < 0 || c < 0 || r >= height || c >= width || away >= depth[r * width + c]) continue;
        depth[r * width + c] = away;
        pixels[r * width + c] = packed;
      }
    }
    context.putImageData(image, 0, 0);
    canvas.dataset.drawn = `${count} ${yaw.toFixed(2)} ${pitch.toFixed(2)}`;
  }
  canvas.onpointerdown = (event) => canvas.setPointerCapture(event.pointerId);
  canvas.onpointermove = (event) => { if (event.buttons) { yaw -= event.movementX / 150; pitch += event.movementY / 150; draw(); } };
  canvas.onwheel = (event) => { event.preventDefault(); zoom *= Math.exp(-event.deltaY / 800); draw(); };
  canvas.onkeydown = (event) => {
    const turn = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
    if (turn) { event.preventDefault(); yaw += turn[0]; pitch += turn[1]; draw(); }
  };
  id("colours").onclick = () => { chosen = 1 - chosen; draw(); };
  draw();
}

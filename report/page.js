"use strict";
// One control plays all videos of the page. A canvas shows frame `now` of a sheet, whose frames are in rows, 1 pixel apart.
const player = document.querySelector(".player");
const [play, back, forward, first] = player.querySelectorAll("button");
const slider = player.querySelector("input");
const speed = player.querySelector("select");
const output = player.querySelector("output");
const canvases = [...player.querySelectorAll("canvas")];
const frames = Number(player.dataset.frames);
const context = Number(player.dataset.context);
const framesPerSecond = Number(player.dataset.rate);
const sheets = new Map();
let now = 0;
let playing = false;
let due = 0; // fraction of a frame that has passed since `now` was shown
let last = 0; // time of the last tick, in ms

function sheet(path) {
  if (!sheets.has(path)) {
    const image = new Image();
    image.addEventListener("load", () => canvases.forEach(draw));
    image.src = path;
    sheets.set(path, image);
  }
  return sheets.get(path);
}

function draw(canvas) {
  const shown = [canvas.dataset.sheet, canvas.dataset.minus].filter(Boolean).map(sheet);
  if (!shown.every((image) => image.complete && image.naturalWidth)) return;
  const { width, height } = canvas;
  const pen = canvas.getContext("2d");
  shown.forEach((image, i) => {
    const columns = (image.naturalWidth + 1) / (width + 1);
    const x = (now % columns) * (width + 1);
    const y = Math.floor(now / columns) * (height + 1);
    pen.globalCompositeOperation = i ? "difference" : "copy"; // the second sheet: absolute error
    pen.drawImage(image, x, y, width, height, 0, 0, width, height);
  });
  canvas.dataset.frame = now + 1;
}

function show(frame) {
  now = ((frame % frames) + frames) % frames;
  slider.value = now + 1;
  const predicted = now >= context;
  player.classList.toggle("predicted", predicted);
  player.classList.toggle("context", !predicted);
  output.textContent =
    `Frame ${now + 1} of ${frames}: ` +
    (predicted ? `predicted frame ${now - context + 1} of ${frames - context}` : `context, frames 1 to ${context}`);
  canvases.forEach(draw);
}

function run(start) {
  playing = start;
  play.textContent = playing ? "Pause" : "Play";
  due = last = 0;
  if (playing) requestAnimationFrame(tick);
}

function tick(time) {
  if (!playing) return;
  // The browser pauses ticks in the background. With this limit, videos then continue where they stopped.
  if (last) due += (Math.min(time - last, 250) / 1000) * framesPerSecond * Number(speed.value);
  last = time;
  const passed = Math.floor(due);
  due -= passed;
  if (passed) show(now + passed);
  requestAnimationFrame(tick);
}

function pauseAt(frame) {
  run(false);
  show(frame);
}

first.addEventListener("click", () => pauseAt(context));
back.addEventListener("click", () => pauseAt(now - 1));
play.addEventListener("click", () => run(!playing));
forward.addEventListener("click", () => pauseAt(now + 1));
slider.addEventListener("input", () => pauseAt(Number(slider.value) - 1));
show(0);
run(!matchMedia("(prefers-reduced-motion: reduce)").matches);

"use strict";
const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const colour = (number) => `hsl(${(number * 137.5) % 360} 70% ${35 + (number * 29) % 35}%)`;
let able = null, current = null;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function problem(text) { $("problem").textContent = text; }

async function call(path, body) {
  let response;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    response = await fetch(path, body === undefined ? {} : options);
  } catch (error) { throw new Error("The server does not answer; is `ldmlab play` still running?"); }
  const value = await response.json().catch(() => ({ error: `The server refused the request (${response.status}).` }));
  if (value.error && !response.ok) throw new Error(value.error);
  return value;
}

function size() {  // [height, width]
  const sides = $("size").value.split("x").map(Number);
  const [height, width] = [sides[0], sides[sides.length - 1]];
  const fits = sides.length < 3 && [height, width].every((side) => Number.isInteger(side) && side > 0 && side <= able.limits.side);
  return fits ? [height, width] : able.size;
}

function place(canvas, event) {  // in pixels of the canvas
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * canvas.width, (event.clientY - box.top) / box.height * canvas.height];
}

function drag(canvas, moved, ended = () => {}) {  // moved(from, to, first)
  let last = null, first = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    first = last = place(canvas, event);
    moved(last, last, first);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null) return;
    const here = place(canvas, event);
    moved(last, here, first);
    last = here;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { if (first) ended(first, last); first = last = null; });
}

async function upload(input) {  // the file as a data URL
  const file = input.files[0];
  if (!file) throw new Error(`Choose a file first: ${input.getAttribute("aria-label")}.`);
  checkUpload(file);
  return await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

function checkUpload(file) {
  const most = able.limits.upload_bytes / 2 ** 20;
  if (file.size > able.limits.upload_bytes) throw new Error(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB, more than the ${most} MB taken here; choose a smaller file.`);
}

const hole = {  // the image to start from and the mask on it
  bitmap: null, image: null, mask: null,
  fit() {  // the largest centre crop of the size's aspect ratio
    if (!this.bitmap) return;
    const [height, width] = size(), canvas = $("hole");
    [canvas.width, canvas.height] = [width, height];
    this.image = make("canvas", { width, height });
    this.mask = make("canvas", { width, height });
    const scale = Math.max(width / this.bitmap.width, height / this.bitmap.height);
    const [w, h] = [this.bitmap.width * scale, this.bitmap.height * scale];
    const context = this.image.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.bitmap, (width - w) / 2, (height - h) / 2, w, h);
    this.draw();
  },
  draw() {
    const context = $("hole").getContext("2d");
    context.drawImage(this.image, 0, 0);
    if (chosen("start") !== "hole") return;
    context.globalAlpha = 0.85;
    context.drawImage(this.mask, 0, 0);
    context.globalAlpha = 1;
  },
  stroke(from, to) {
    if (!this.image || chosen("start") !== "hole") return;
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = $("erase").checked ? "destination-out" : "source-over";
    Object.assign(context, { lineCap: "round", strokeStyle: "#e0218a", lineWidth: Math.max(1, $("brush").value / 100 * this.mask.width * 0.6) });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    this.draw();
  },
  holes() {  // white where painted, on black
    const context = this.mask.getContext("2d"), { width, height } = this.mask, pixels = context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3), pixels.data[i + 3] = 255;
    const canvas = make("canvas", { width, height });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png");
  },
};

const boxes = {
  list: [],
  draw(open = null) {
    const canvas = $("boxes"), context = canvas.getContext("2d"), [height, width] = size();
    [canvas.width, canvas.height] = [720, Math.round(720 * height / width)];
    Object.assign(context, { lineWidth: 4, font: "24px system-ui, sans-serif" });
    for (const { class_id, box } of open ? [...this.list, open] : this.list) {
      const [x0, y0, x1, y1] = box.map((value, i) => value * (i % 2 ? canvas.height : canvas.width));
      context.strokeStyle = context.fillStyle = colour(class_id);
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
      context.fillText(className("boxes", class_id), x0 + 8, y0 + 28);
    }
    $("boxes-count").textContent = `${this.list.length} drawn.`;
  },
  of(from, to) {
    const canvas = $("boxes"), share = (value, side) => Math.min(Math.max(value / side, 0), 1);
    const [xs, ys] = [[from[0], to[0]], [from[1], to[1]]].map((pair) => pair.sort((a, b) => a - b));
    return { class_id: Number($("boxes-class").value), box: [share(xs[0], canvas.width), share(ys[0], canvas.height), share(xs[1], canvas.width), share(ys[1], canvas.height)] };
  },
};

const labels = {
  map: null, height: 0, width: 0,
  fit() {
    [this.height, this.width] = size();
    [$("labels").width, $("labels").height] = [this.width, this.height];
    this.fill();
  },
  fill() { this.map = new Uint16Array(this.height * this.width).fill(Number($("labels-class").value)); this.draw(); },
  draw() {
    const context = $("labels").getContext("2d");
    for (let i = 0; i < this.map.length; i++) { context.fillStyle = colour(this.map[i]); context.fillRect(i % this.width, Math.floor(i / this.width), 1, 1); }
  },
  stroke(from, to) {
    const radius = Math.max(0.5, $("labels-brush").value / 100 * this.width * 0.3), number = Number($("labels-class").value);
    const parts = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / Math.max(radius / 2, 0.5)) || 1, context = $("labels").getContext("2d");
    context.fillStyle = colour(number);
    for (let part = 0; part <= parts; part++) {
      const [x, y] = [0, 1].map((axis) => from[axis] + (to[axis] - from[axis]) * part / parts);
      for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(this.height, y + radius); row++)
        for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(this.width, x + radius); column++)
          if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius + 0.5) { this.map[row * this.width + column] = number; context.fillRect(column, row, 1, 1); }
    }
  },
  value() {
    let text = "";
    for (const number of this.map) text += String.fromCharCode(number & 255, number >> 8);
    return { height: this.height, width: this.width, data: btoa(text) };
  },
};

function className(input, number) {
  const { names } = able.classes[input];
  return names[number] || `class ${number}`;
}

function fillClasses(select, input) {
  const known = able.classes[input];
  if (known) for (let number = 0; number < known.count; number++) select.add(new Option(className(input, number), number));
}

function show() {  // what belongs to the choices made
  const start = chosen("start"), reads = new Set(able.reads);
  $("image-part").hidden = start === "noise";
  $("strength-part").hidden = start !== "image";
  $("hole-part").hidden = $("hole-note").hidden = start !== "hole";
  $("hole").hidden = hole.bitmap === null;
  $("strength-shown").textContent = $("strength").value;
  $("sweep").hidden = chosen("strip") !== "sweep";
  $("steps").disabled = chosen("strip") === "sweep";
  $("size-part").hidden = reads.has("low_resolution");
  if (hole.image) hole.draw();
}

async function form() {
  const reads = new Set(able.reads), inputs = {}, settings = { sampler: $("sampler").value, seed: $("seed").value }, start = chosen("start"), strip = chosen("strip");
  if (reads.has("caption")) inputs.caption = $("caption").value;
  if (reads.has("caption") && $("negative").value.trim()) inputs.negative_prompt = $("negative").value;
  if (reads.has("class_id")) inputs.class_id = $("class_id").value;
  if (reads.has("boxes")) inputs.boxes = boxes.list;
  if (reads.has("segmentation")) inputs.segmentation = labels.value();
  for (const name of ["low_resolution", "reference"]) if (reads.has(name)) inputs[name] = await upload($(name));
  if (start !== "noise") {
    if (!hole.image) throw new Error("Choose an image to start from first.");
    inputs[start === "hole" ? "image" : "init_image"] = hole.image.toDataURL("image/png");
    if (start === "hole") inputs.mask = hole.holes(); else settings.strength = $("strength").value;
  }
  if (!reads.has("low_resolution")) settings.size = $("size").value;
  if (able.guidance !== null) settings.guidance_scale = $("guidance_scale").value;
  if (strip !== "sweep" && $("steps").value.trim()) settings.steps = $("steps").value;
  return { inputs, settings, count: $("count").value, trajectory: strip === "trajectory", ...(strip === "sweep" ? { sweep: $("sweep").value } : {}) };
}

function running(on) { $("make").disabled = on; $("stop").disabled = !on; $("live").hidden = !on; }

async function submit(event) {
  event.preventDefault();
  problem("");
  running(true);
  $("status").textContent = "sending ...";
  $("previews").replaceChildren();
  try {
    const body = await form();
    const { id, notes } = await call("make", body);
    current = id;
    if (notes.length) problem(notes.join("; "));
    const state = await follow(id);
    if (state.state === "failed") problem(state.error);
    if (state.state === "done") results(state, body);
    if (state.state === "stopped") problem("Stopped; nothing was kept.");
  } catch (error) { problem(error.message); }
  current = null;
  running(false);
}

async function follow(id) {
  for (;;) {
    const state = await call(`state/${id}`);
    if (!["waiting", "running"].includes(state.state)) return state;
    $("progress").max = state.total;
    $("progress").value = state.done;
    $("status").textContent = state.state === "waiting" ? `${state.before} before yours` : `${state.done} of ${state.total} steps, all images together${able.filter ? "" : "; below, what the model expects by now"}`;
    able.models.forEach((name, number) => { if (state.previews[number]) preview(number, state.previews[number]); });
    await new Promise((done) => setTimeout(done, 250));
  }
}

function preview(number, source) {
  while ($("previews").children.length <= number) $("previews").append(make("div", {}, make("img", { alt: `preview of ${able.models[$("previews").children.length]}` })));
  $("previews").children[number].firstChild.src = source;
}

function results(state, body) {
  $("empty").hidden = true;
  const columns = state.parts.map((part, number) => {
    const source = (name) => `image/${state.id}/${name}`;
    const link = (name) => make("a", { href: source(name), target: "_blank", title: "open the file" }, make("img", { src: source(name), alt: `${able.models[number]}: ${name}` }));
    const images = make("div", { className: "images" }, ...part.images.map(link));
    const strips = part.strips.map((name) => make("div", { className: "strip" }, link(name)));
    const rows = Object.entries(part.settings).map(([name, value]) => make("tr", {}, make("td", { textContent: name }), make("td", { textContent: value })));
    const heading = able.models.length > 1 ? [make("h2", { textContent: able.models[number] })] : [];
    const blocked = part.words ? [make("p", { textContent: part.words })] : [];
    return make("div", {}, ...heading, images, ...strips, ...blocked, make("details", {}, make("summary", { textContent: "settings in the file" }), make("table", {}, ...rows)));
  });
  const title = [body.inputs.caption, body.inputs.class_id !== undefined ? className("class_id", body.inputs.class_id) : "", `seed ${body.settings.seed}`].filter(Boolean).join(", ");
  $("results").prepend(make("article", {}, make("h2", { textContent: title }), make("div", { className: "models" }, ...columns), make("small", { textContent: `in ${state.folder}` })));
}

async function choose(input) {
  problem("");
  try {
    if (input.files[0]) checkUpload(input.files[0]);
    if (input === $("image")) {
      hole.bitmap = await createImageBitmap(input.files[0]).catch(() => { throw new Error("This file cannot be read as an image; choose another one."); });
      hole.fit();
      show();
    }
  } catch (error) { input.value = ""; problem(error.message); }
}

function defaults() {
  const reads = new Set(able.reads), [height, width] = able.size;
  $("title").textContent = `ldmlab play: ${able.models.join(" and ")}`;
  $("marks").textContent = able.filter ? `${able.marks}; blocked: ${able.filter.join(", ")}` : able.marks;
  if (able.filter) document.querySelector("input[value=trajectory]").parentElement.hidden = true;  // it would show blocked images
  if (able.models.length > 1) $("noise").textContent = able.same_noise ? "side by side, from the same noise" : "side by side; their latents differ in shape, so their noise differs";
  for (const part of document.querySelectorAll("[data-reads]")) part.hidden = !reads.has(part.dataset.reads);
  $("start-part").hidden = reads.has("low_resolution");
  if (reads.has("mask")) { document.querySelector("input[value=hole]").checked = true; $("starts").hidden = true; }
  $("guidance-part").hidden = $("negative-part").hidden = able.guidance === null;
  if (able.guidance !== null) $("guidance_scale").value = able.guidance;
  for (const name of able.samplers) $("sampler").add(new Option(name === "auto" ? `auto (${able.auto.sampler})` : name, name));
  for (let number = 1; number <= able.limits.images; number++) $("count").add(new Option(number, number));
  $("count").value = Math.min(able.models.length > 1 ? 2 : 4, able.limits.images);
  $("steps").placeholder = `${able.auto.steps} (auto)`;
  $("size").value = height === width ? height : `${height}x${width}`;
  $("size").title = `one side, or HEIGHTxWIDTH; multiples of ${able.step}`;
  $("strength").value = able.strength;
  $("low-note").textContent = `The result is ${able.enlargement} times as large, at most ${able.limits.side} px a side.`;
  for (const [select, input] of [["class_id", "class_id"], ["boxes-class", "boxes"], ["labels-class", "segmentation"]]) fillClasses($(select), input);
  if (reads.has("segmentation")) labels.fit();
  if (reads.has("boxes")) boxes.draw();
}

async function begin() {
  able = await call("able");
  defaults();
  drag($("hole"), (from, to) => hole.stroke(from, to));
  drag($("labels"), (from, to) => labels.stroke(from, to));
  drag($("boxes"), (from, to, first) => boxes.draw(boxes.of(first, to)), (first, last) => {
    const found = boxes.of(first, last);
    if (found.box[2] - found.box[0] > 0.01 && found.box[3] - found.box[1] > 0.01) boxes.list.push(found);
    boxes.draw();
  });
  $("boxes-undo").onclick = () => { boxes.list.pop(); boxes.draw(); };
  $("boxes-clear").onclick = () => { boxes.list = []; boxes.draw(); };
  $("labels-fill").onclick = () => labels.fill();
  $("hole-clear").onclick = () => hole.fit();
  $("new-seed").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e6); };
  $("size").onchange = () => { hole.fit(); if (able.reads.includes("segmentation")) labels.fit(); if (able.reads.includes("boxes")) boxes.draw(); };
  $("stop").onclick = () => current && call(`stop/${current}`, {}).catch((error) => problem(error.message));
  for (const name of ["image", "low_resolution", "reference"]) $(name).onchange = () => choose($(name));
  $("form").addEventListener("input", show);
  $("form").onsubmit = submit;
  show();
}

begin().catch((error) => problem(error.message));

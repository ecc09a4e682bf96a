// The page in the browser: a client of the job routes, like any other. Gradio runs this once, with `element`.
//
// A job is followed by its events (Server-Sent Events), a preview of the video with each step. What the tab has made is
// kept in its session storage, so that a reload, or a server that was restarted, loses nothing.
const $ = (id) => element.querySelector("#" + id);
const STORAGE = "codmd-session", KEPT = 24, FOLLOWED = 2, POLL_MS = 1500, PROBE_MS = 4000;
const FINAL = ["completed", "failed", "cancelled", "expired", "lost"];
const STAGES = ["queue", "text", "denoise", "decode", "encode"];
const FIELDS = ["prompt", "seed", "width", "height", "num_frames", "fps", "quality"];
const MAX_SEED = (1n << 63n) - 1n;
const jobs = new Map();   // by id: what the server says of a job, and what this tab saw of it
let items = [];           // newest first: {jobs: [id] or [student's, teacher's], error}
let shown = null, models = [], isDown = false;
const streams = new Map();

// Talking to the server

class Refusal extends Error {
  constructor(status, error) { super(error.message); this.status = status; this.code = error.code; this.field = error.field; }
}

// Seeds have 63 bits, numbers of JavaScript 53: such a seed stays text.
const parse = (text) => JSON.parse(text.replace(/"seed":\s*(\d{16,})/g, '"seed":"$1"'));

async function ask(path, options = {}) {
  let answer, text;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
    text = await answer.text();
  } catch {
    serverIs(false);
    throw new Refusal(0, { code: "down", message: "The server does not answer." });
  }
  serverIs(true);
  let body = {};
  try { body = parse(text); } catch { /* a proxy's own words are none of ours */ }
  if (answer.ok) return body;
  const error = body?.error?.message ? body.error : { code: "", message: `The server answered ${answer.status}.` };
  throw new Refusal(answer.status, error);
}

function serverIs(up) {
  if (up === !isDown) return;
  isDown = !up;
  $("banner").hidden = up;
  $("banner").textContent = up ? "" : "The server does not answer. This page goes on by itself when it is back.";
  say(up ? "The server is back." : "The server does not answer.");
  if (up) { loadModels(); followAll(); }
}

async function probe() {
  if (document.visibilityState === "visible" || isDown) {
    const health = await ask("health").catch(() => null);
    const isWarm = models.length && models.every((model) => model.is_ready);
    if (health && (!isWarm || health.is_ready !== isWarm)) await loadModels();
  }
  setTimeout(probe, isDown ? 1000 : PROBE_MS);
}

async function submit(body, isLive) {
  const headers = { "Content-Type": "application/json", Prefer: "respond-async" };
  if (isLive) headers["Cache-Control"] = "no-cache";
  const { seed, ...rest } = body;
  const text = JSON.stringify({ ...rest, preview: true });
  const job = await ask("generate", { method: "POST", headers, body: seed === null ? text : `${text.slice(0, -1)},"seed":${seed}}` });
  jobs.set(job.id, { ...job, isOwn: true });
  return job.id;
}

// Following jobs

const isFinal = (job) => !job || FINAL.includes(job.status);

function followAll() {
  const wanted = [...(shown?.jobs ?? []), ...items.flatMap((item) => item.jobs)].filter((id) => !isFinal(jobs.get(id)));
  const first = [...new Set(wanted)].slice(0, FOLLOWED);
  // A browser opens six connections to a host: others are asked for now and then.
  for (const id of [...streams.keys()]) if (!first.includes(id)) closeStream(id);
  first.forEach(follow);
}

function closeStream(id) {
  streams.get(id)?.close();
  streams.delete(id);
}

function follow(id) {
  if (streams.has(id) || isDown) return;
  const stream = new EventSource(`jobs/${id}/events`);
  streams.set(id, stream);
  const on = (kind, change) => stream.addEventListener(kind, (event) => {
    if (streams.get(id) !== stream) return;
    change(jobs.get(id), parse(event.data));
    draw(id);
  });
  on("queued", (job, data) => Object.assign(job, { status: "queued", startedMs: null, step: 0, progress: 0 }, data));
  on("started", (job) => Object.assign(job, { status: "running", stage: "text", startedMs: performance.now(), preview: "" }));
  on("text", (job, data) => Object.assign(job, { status: "running", stage: "text", progress: data.progress }));
  on("step", (job, data) => Object.assign(job, { status: "running", stage: "denoise" }, data));
  on("decoding", (job, data) => Object.assign(job, { status: "running", stage: "decode" }, data));
  on("encoding", (job, data) => Object.assign(job, { status: "running", stage: "encode" }, data));
  for (const kind of ["done", "failed", "cancelled", "expired"]) {
    stream.addEventListener(kind, () => { closeStream(id); refresh(id); });
  }
  stream.onerror = () => { closeStream(id); setTimeout(() => refresh(id), 300); };
}

async function refresh(id) {
  const before = jobs.get(id);
  try {
    const job = await ask(`jobs/${id}`);
    jobs.set(id, { ...before, ...job, preview: before?.preview, isOwn: before?.isOwn });
  } catch (refusal) {
    if (refusal.status === 404) jobs.set(id, { ...before, id, status: "lost", error: refusal });
    else if (refusal.status) setTimeout(() => refresh(id), POLL_MS);
  }
  const job = jobs.get(id);
  if (isFinal(job) && job && !isFinal(before)) say(job.status === "completed" ? `Done: ${job.params.prompt}` : describe(job));
  draw(id);
  followAll();
  save();
}

function poll() {
  for (const [id, job] of jobs) if (!isFinal(job) && !streams.has(id) && !isDown) refresh(id);
  setTimeout(poll, POLL_MS);
}

// The form

const model = () => models.find((each) => !each.is_teacher);
const teacher = () => models.find((each) => each.is_teacher);

async function loadModels() {
  try {
    models = (await ask("models")).models;
  } catch { return; }
  const now = model();
  if (!now) return;
  $("compare").hidden = !teacher();
  if (now.about) $("about").textContent = now.about;
  $("examples").hidden = !now.examples.length;
  $("examples").replaceChildren(...now.examples.map((prompt) => {
    const button = make("button", { type: "button", textContent: prompt });
    button.onclick = () => { $("prompt").value = prompt; check("prompt"); $("prompt").focus(); };
    return button;
  }));
  if (!$("prompt").value && now.examples.length && !shown) $("prompt").value = now.examples[0];
  for (const name of ["width", "height", "num_frames", "fps"]) if (!$(name).value) $(name).value = now[name];
  const quality = $("quality").value;
  $("quality").replaceChildren(...now.qualities.map((name) => make("option", { value: name, textContent: name })));
  $("quality").value = now.qualities.includes(quality) ? quality : now.qualities[0];
  const most = { width: now.max_side_px, height: now.max_side_px, num_frames: now.max_num_frames };
  for (const [name, value] of Object.entries(most)) $(name).max = value;
  $("width").step = $("height").step = $("width").min = $("height").min = now.size_multiple;
  $("num_frames").step = now.frame_multiple;
  $("num_frames").min = 1;
  $("limits").textContent = `Trained at ${now.width} x ${now.height} with ${now.num_frames} frames at ${now.fps} per second. `
    + `Sides are multiples of ${now.size_multiple}, frames ${now.frame_multiple}k + 1.`;
  drawFacts(now);
}

function drawFacts(now) {
  const entries = [["model", now.name], ["device", now.device], ["attention", now.attention], ["execution", now.execution],
    ["steps", now.num_steps], ["precision", now.lossy || now.dtype]];
  if (teacher()) entries.push(["teacher", `${teacher().name}, ${teacher().num_steps} steps, guidance ${teacher().guidance_scale}`]);
  const spans = entries.filter(([, value]) => value !== "").map(([name, value]) => {
    const span = make("span", { textContent: `${name} ` });
    span.append(make("b", { textContent: value }));
    return span;
  });
  if (!now.is_ready) spans.unshift(make("span", { textContent: now.reason || "the model is loading" }));
  const docs = make("a", { href: "docs", textContent: "HTTP API" });
  $("facts").replaceChildren(...spans, docs);
}

// One sentence on what is wrong with a field; empty when nothing is.
function problem(name) {
  const text = $(name).value.trim(), now = model();
  if (name === "prompt") return text ? "" : "Write what the video should show.";
  if (name === "quality" || (name === "seed" && $("new-seed").checked)) return "";
  if (name === "seed") {
    return /^\d{1,19}$/.test(text) && BigInt(text) <= MAX_SEED ? "" : `The seed must be a whole number from 0 to ${MAX_SEED}.`;
  }
  if (!/^\d{1,9}$/.test(text) || Number(text) < 1) return "This must be a whole number above 0.";
  const value = Number(text);
  if (name === "fps") return value <= 120 ? "" : "At most 120 frames per second.";
  if (!now) return "";
  if (name === "num_frames") {
    const affordable = Math.floor(now.max_pixels / ($("width").value * $("height").value)) || Infinity;
    const most = now.frame_multiple * Math.floor((Math.min(now.max_num_frames, affordable) - 1) / now.frame_multiple) + 1;
    if ((value - 1) % now.frame_multiple === 0 && value <= most) return "";
    const nearest = now.frame_multiple * Math.round((Math.min(value, most) - 1) / now.frame_multiple) + 1;
    return `Frames must be ${now.frame_multiple}k + 1 and at this size up to ${most}; ${Math.max(1, Math.min(nearest, most))} would do.`;
  }
  if (value % now.size_multiple === 0 && value <= now.max_side_px) return "";
  const nearest = now.size_multiple * Math.max(1, Math.round(Math.min(value, now.max_side_px) / now.size_multiple));
  return `This must be a multiple of ${now.size_multiple} up to ${now.max_side_px}; ${nearest} would do.`;
}

function mark(name, sentence) {
  $(`${name}-error`).textContent = sentence;
  if (sentence) $(name).setAttribute("aria-invalid", "true");
  else $(name).removeAttribute("aria-invalid");
}

function check(name) {
  const sentence = problem(name);
  mark(name, sentence);
  return !sentence;
}

function isGood() {
  $("form-error").textContent = "";
  const wrong = FIELDS.filter((name) => !check(name));
  if (!wrong.length) return true;
  if ($(wrong[0]).closest("details")) $("settings").open = true;
  $(wrong[0]).focus();
  return false;
}

function body() {
  const number = (name) => Number($(name).value);
  const asked = { prompt: $("prompt").value, seed: $("new-seed").checked ? null : $("seed").value.trim(),
    quality: $("quality").value };
  for (const name of ["width", "height", "num_frames", "fps"]) if ($(name).value) asked[name] = number(name);
  return asked;
}

async function run(isPair, asked) {
  if (asked === undefined) {
    if (!isGood()) return;
    asked = body();
  }
  try {
    let item;
    if (isPair) {
      // Both begin with the same noise, and both are made now: that is what the clocks compare.
      if (asked.seed === null) asked.seed = String(crypto.getRandomValues(new Uint32Array(1))[0]);
      const student = await submit({ ...asked, model: model().name }, true);
      item = { jobs: [student, await submit({ ...asked, model: teacher().name }, true)] };
    } else {
      item = { jobs: [await submit(asked, false)] };
    }
    items = [item, ...items].slice(0, KEPT);
    $("seed").value = jobs.get(item.jobs[0]).seed;
    say(isPair ? "Both are on their way." : "The video is on its way.");
    show(item, true);
    for (const id of item.jobs) if (isFinal(jobs.get(id))) refresh(id);
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    const sentence = refusal.message.charAt(0).toUpperCase() + refusal.message.slice(1);
    if (FIELDS.includes(refusal.field)) {
      mark(refusal.field, sentence);
      if ($(refusal.field).closest("details")) $("settings").open = true;
      $(refusal.field).focus();
    } else $("form-error").textContent = sentence;
  }
}

// The session of this tab

function save() {
  const known = items.flatMap((item) => item.jobs).map((id) => jobs.get(id)).filter(Boolean);
  const light = known.map(({ preview, startedMs, ...rest }) => ({ ...rest, error: rest.error && { message: rest.error.message } }));
  try { sessionStorage.setItem(STORAGE, JSON.stringify({ items, jobs: light, shown: items.indexOf(shown) })); } catch { /* it is full */ }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(STORAGE)) ?? { items: [], jobs: [] };
    kept.jobs.forEach((job) => jobs.set(job.id, job));
    items = kept.items;
    return items[kept.shown];
  } catch { return undefined; }
}

async function openLink(ids) {
  const item = items.find((each) => each.jobs.join() === ids.join()) ?? { jobs: ids };
  ids.forEach((id) => jobs.has(id) || jobs.set(id, { id, status: "running", stage: "", isOwn: false }));
  await Promise.all(ids.map(refresh));
  show(item, true);
  const job = jobs.get(ids[0]);
  if (job.params && !$("prompt").value) $("prompt").value = job.params.prompt;
}

function leave() {
  save();
  for (const id of [...streams.keys()]) closeStream(id);
  for (const [id, job] of jobs) if (job.isOwn && !isFinal(job)) navigator.sendBeacon(`jobs/${id}/leave`);
}

function begin() {
  const last = restore();
  const asked = (new URLSearchParams(location.search).get("job") ?? "").split(",").filter((id) => /^[A-Za-z0-9]{1,40}$/.test(id)).slice(0, 2);
  $("panes").replaceChildren(make("article", { className: "pane" }, make("div", { className: "frame" }, make("p", { textContent: "your video appears here" }))));
  $("form").onsubmit = (event) => { event.preventDefault(); run(false); };
  $("compare").onclick = () => run(true);
  $("prompt").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(false); } };
  $("new-seed").onchange = () => {
    $("seed").disabled = $("new-seed").checked;
    if ($("new-seed").checked) mark("seed", "");
    else $("seed").focus();
  };
  // What was wrong is judged again while it is mended. Nothing is marked before it is sent: a sentence that appears
  // while a button is pressed would move the button away.
  for (const name of FIELDS) $(name).addEventListener("input", () => $(name).hasAttribute("aria-invalid") && check(name));
  addEventListener("pagehide", leave);
  addEventListener("pageshow", (event) => { if (event.persisted) followAll(); });
  loadModels().then(() => { if (!$("prompt").value) $("prompt").focus({ preventScroll: true }); });
  if (asked.length) openLink(asked);
  else if (last) { show(last, false); items.flatMap((item) => item.jobs).forEach((id) => { if (!isFinal(jobs.get(id))) refresh(id); }); }
  drawThumbs();
  setInterval(drawClocks, 100);
  setTimeout(probe, PROBE_MS);
  setTimeout(poll, POLL_MS);
}

// What the page shows of jobs: panes, clocks, thumbnails. Follows page.js in the same scope.

const make = (tag, values = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
};

const seconds = (value) => (value < 9.95 ? value.toFixed(1) : Math.round(value)) + " s";
const say = (sentence) => { $("announce").textContent = sentence; };

function slug(job) {
  const words = job.params.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60).replace(/^-|-$/g, "");
  return `${[words || "video", job.params.teacher ? job.model.replace(/[^A-Za-z0-9]+/g, "-") : "", job.seed].filter(Boolean).join("-")}.${job.params.format}`;
}

// What a job is at, in one line.
function describe(job) {
  const eta = job.eta_s ? `, about ${seconds(job.eta_s)}` : "";
  if (job.status === "queued") {
    if (job.waiting_for) return `Waiting: ${job.waiting_for}.`;
    return job.position ? `Waiting, ${job.position} before it${eta}.` : `Waiting, next in line${eta}.`;
  }
  if (job.status === "running") {
    if (job.stage === "denoise") return `Step ${job.step} of ${job.num_steps ?? "?"}.`;
    if (job.stage === "decode") return `Decoding, ${job.frames ?? 0} of ${job.num_frames ?? job.params.num_frames} frames.`;
    return job.stage === "encode" ? "Encoding." : "Reading the prompt.";
  }
  if (job.status === "failed") return `It failed: ${job.error?.message ?? "no reason is known"}.`.replace(/\.\.$/, ".");
  if (job.status === "cancelled") return "It was cancelled.";
  if (job.status === "expired") return "Its video is no longer kept. The same prompt and seed make it again.";
  if (job.status === "lost") return "The server knows no such video: the link is wrong, it belongs to another key, or it is forgotten.";
  return "";
}

function spentS(job) {
  if (job.status === "completed") return job.inference_time_s;
  return job.status === "running" && job.startedMs ? (performance.now() - job.startedMs) / 1000 : null;
}

function show(item, isNew) {
  shown = item;
  element.querySelector(".columns").classList.toggle("pair", item.jobs.length > 1);
  $("panes").replaceChildren(...item.jobs.map((id) => {
    const pane = make("article", { className: "pane" });
    pane.dataset.job = id;
    pane.append(make("div", { className: "head" }), make("div", { className: "frame" }), make("div", { className: "below" }));
    return pane;
  }));
  item.jobs.forEach(drawPane);
  drawThumbs();
  followAll();
  save();
  const isNarrow = matchMedia("(max-width: 860px)").matches;
  if (isNew && (isNarrow || item.jobs.length > 1)) $("screen").scrollIntoView({ block: "start", behavior: "instant" });
}

function draw(id) {
  drawPane(id);
  drawThumbs();
}

function drawPane(id) {
  const pane = element.querySelector(`.pane[data-job="${CSS.escape(id)}"]`), job = jobs.get(id);
  if (!pane || !job) return;
  const [head, frame, below] = pane.children;
  pane.dataset.status = job.status;
  pane.dataset.step = job.step ?? 0;
  if (shown.jobs.length > 1) {
    const known = models.find((each) => each.name === job.model);
    head.replaceChildren(make("h3", {}, make("span", { textContent: `${job.model ?? ""}${known ? `, ${known.num_steps} steps` : ""}` }),
      make("span", { className: "clock" })));
  }
  if (job.params) frame.style.setProperty("--ratio", `${job.params.width} / ${job.params.height}`);
  drawFrame(frame, job);
  drawBelow(below, job);
  drawClocks();
}

function drawFrame(frame, job) {
  if (job.status === "completed") {
    const source = `jobs/${job.id}/video`;
    if (frame.querySelector("video")) return;
    const isPicture = job.params.format !== "mp4";
    const video = isPicture ? make("img", { src: source, alt: job.params.prompt })
      : make("video", { src: source, autoplay: true, loop: true, muted: true, playsInline: true, controls: true });
    video.setAttribute("aria-label", `Video: ${job.params.prompt}`);
    frame.replaceChildren(video);
  } else if (job.preview && !isFinal(job)) {
    const image = frame.querySelector("img") ?? make("img", { alt: "Preview of the video as it forms" });
    if (image.getAttribute("src") !== job.preview) image.src = job.preview;
    if (!image.parentNode) frame.replaceChildren(image);
  } else {
    frame.replaceChildren(make("p", { textContent: isFinal(job) ? describe(job) : job.status === "queued" ? "waiting" : "starting" }));
  }
}

function drawBelow(below, job) {
  const parts = [];
  if (!isFinal(job)) {
    const bar = make("div", { className: "bar" });
    bar.setAttribute("role", "progressbar");
    bar.setAttribute("aria-label", "Progress");
    bar.setAttribute("aria-valuenow", Math.round(100 * (job.progress ?? 0)));
    bar.append(make("i", { className: job.stage || "queue", style: `width: ${100 * (job.progress ?? 0)}%` }));
    const cancel = make("button", { type: "button", className: "cancel", textContent: "Cancel", onclick: () => stop(job.id) });
    parts.push(bar, make("p", { className: "state", textContent: describe(job) }), caption(job), make("div", { className: "actions" }, cancel));
    // Focus and clicks stay with the button while the rest moves.
    const old = below.querySelector("button.cancel");
    if (old) {
      below.querySelector(".bar").replaceWith(bar);
      below.querySelector(".state").replaceWith(parts[1]);
      return;
    }
  } else if (job.status === "completed") {
    parts.push(...stages(job), caption(job));
    if (job.warnings?.length) parts.push(make("p", { className: "note", textContent: job.warnings.join("; ") }));
    parts.push(actions(job));
  } else {
    parts.push(make("p", { className: "failed", textContent: describe(job) }));
    if (job.params) parts.push(caption(job), make("div", { className: "actions" }, again("Make it again", job, job.seed)));
  }
  if (below.dataset.status === job.status && isFinal(job)) return;
  below.dataset.status = job.status;
  below.replaceChildren(...parts);
}

function caption(job) {
  const params = job.params;
  return make("div", {}, make("p", { className: "caption", textContent: params.prompt }),
    make("p", { className: "made", textContent: `seed ${job.seed} · ${params.width} x ${params.height} · ${params.num_frames} frames at ${params.fps} per second` }));
}

function stages(job) {
  const known = STAGES.filter((stage) => stage in job.timings_ms);
  if (!known.length) return [make("p", { className: "state", textContent: "It was there already: an equal request had been answered." })];
  const bar = make("div", { className: "bar" });
  bar.setAttribute("aria-hidden", "true");
  bar.append(...known.filter((stage) => stage !== "queue").map((stage) => make("i", { className: stage, style: `flex: ${job.timings_ms[stage]}` })));
  const entry = (name, value, colour) => make("span", {}, ...(colour ? [make("i", { className: colour })] : []), `${name} `,
    make("b", { textContent: value }));
  return [bar, make("p", { className: "legend" }, ...known.map((stage) => entry(stage, `${Math.round(job.timings_ms[stage])} ms`, stage)),
    entry("made in", `${job.inference_time_s.toFixed(2)} s`))];
}

function actions(job) {
  const button = (text, onclick) => make("button", { type: "button", textContent: text, onclick });
  const download = make("a", { className: "button", href: `jobs/${job.id}/video/${slug(job)}`, download: slug(job), textContent: "Download" });
  const link = () => `${location.origin}${location.pathname}?job=${shown.jobs.join(",")}`;
  return make("div", { className: "actions" }, download, again("Again with a new seed", job, null),
    button("Copy link", (event) => copy(event, link())), button("Copy as curl", (event) => copy(event, curl(job))),
    button("Copy as Python", (event) => copy(event, python(job))));
}

function again(text, job, seed) {
  const { prompt, width, height, num_frames, fps, crf, format } = job.params;
  const asked = () => ({ prompt, width, height, num_frames, fps, format, seed: seed === null ? null : String(seed),
    ...(format === "gif" ? {} : { crf }) });
  return make("button", { type: "button", textContent: text, onclick: () => {
    if (shown.jobs.length > 1 && teacher()) run(true, asked());
    else run(false, job.params.teacher ? { ...asked(), model: job.model } : asked());
  } });
}

async function stop(id) {
  try {
    const job = await ask(`jobs/${id}`, { method: "DELETE" });
    jobs.set(id, { ...jobs.get(id), ...job });
    closeStream(id);
    draw(id);
    followAll();
    save();
  } catch { /* the banner says that the server is down */ }
}

// The request of a job as JSON text; a seed above 53 bits is text here and a number there.
function request(job) {
  const { prompt, width, height, num_frames, fps, crf, format, teacher: isTeacher } = job.params;
  const asked = { prompt, width, height, num_frames, fps, ...(format === "gif" ? {} : { crf }), ...(format === "mp4" ? {} : { format }),
    ...(isTeacher ? { model: job.model } : {}) };
  return `${JSON.stringify(asked).slice(0, -1)},"seed":${job.seed}}`;
}

const curl = (job) => `curl -sS ${location.origin}${location.pathname}generate -H 'Content-Type: application/json' `
  + `-d '${request(job).replaceAll("'", "'\\''")}' -o ${slug(job)}`;

const python = (job) => `import urllib.request

body = ${JSON.stringify(request(job)).replace(/[\u007f-\uffff]/g, (char) => "\\u" + char.charCodeAt(0).toString(16).padStart(4, "0"))}
request = urllib.request.Request(
    "${location.origin}${location.pathname}generate", body.encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request) as answer, open("${slug(job)}", "wb") as file:
    file.write(answer.read())
`;

async function copy(event, text) {
  const button = event.currentTarget, before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Away from localhost and https a page may not use the clipboard directly.
    const area = make("textarea", { value: text, className: "unseen" });
    element.firstElementChild.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.dataset.copied = text;
  button.textContent = "Copied";
  say("Copied.");
  setTimeout(() => { button.textContent = before; }, 1500);
}

function drawClocks() {
  if (shown?.jobs.length !== 2) { $("ratio").hidden = true; return; }
  const spent = shown.jobs.map((id) => (jobs.get(id) ? spentS(jobs.get(id)) : null));
  element.querySelectorAll(".clock").forEach((clock, index) => {
    const id = clock.closest(".pane").dataset.job, value = spentS(jobs.get(id));
    clock.textContent = value === null || value === undefined ? "" : `${value.toFixed(2)} s`;
  });
  const isDone = shown.jobs.every((id) => jobs.get(id)?.status === "completed") && spent.every(Boolean);
  $("ratio").hidden = !isDone;
  if (isDone) {
    $("ratio").replaceChildren("The same prompt, the same noise: the student is ",
      make("b", { textContent: `${(spent[1] / spent[0]).toFixed(1)} times` }), " as fast.");
  }
}

function drawThumbs() {
  $("history").hidden = !items.length;
  const list = $("thumbs");
  items.forEach((item, index) => {
    const key = item.jobs.join(","), all = item.jobs.map((id) => jobs.get(id)), job = all[0];
    const state = all.map((each) => each?.status).join();
    let entry = list.children[index];
    if (entry?.dataset.key !== key) {
      entry = [...list.children].find((each) => each.dataset.key === key) ?? make("li", {}, make("button", { type: "button", className: "thumb" }));
      entry.dataset.key = key;
      entry.firstChild.onclick = () => show(item, true);
      list.insertBefore(entry, list.children[index] ?? null);
    }
    const button = entry.firstChild;
    if (item === shown) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    const kind = all.every(isFinal) ? (job?.status === "completed" ? `seed ${job.seed}` : job?.status ?? "") :
      all.map((each) => (isFinal(each) ? "done" : each.status === "queued" ? "waiting" : `${Math.round(100 * (each.progress ?? 0))} %`)).join(" · ");
    if (entry.dataset.state !== state) {
      entry.dataset.state = state;
      const frame = make("span", { className: "frame" });
      if (job?.params) frame.style.setProperty("--ratio", `${job.params.width} / ${job.params.height}`);
      const isPicture = job?.params?.format !== "mp4";
      if (job?.status === "completed") {
        const picture = isPicture ? make("img", { src: `jobs/${job.id}/video`, alt: "" })
          : make("video", { src: `jobs/${job.id}/video#t=0.6`, muted: true, preload: "metadata" });
        picture.setAttribute("aria-hidden", "true");
        picture.tabIndex = -1;
        frame.append(picture);
      } else frame.append(job?.status ?? "");
      const words = (item.jobs.length > 1 ? "Compare: " : "") + (job?.params?.prompt ?? "unknown");
      button.replaceChildren(frame, make("span", { className: "words", textContent: words }), make("span", { className: "kind" }));
    }
    button.querySelector(".kind").textContent = kind;
  });
  while (list.children.length > items.length) list.lastChild.remove();
}

begin();

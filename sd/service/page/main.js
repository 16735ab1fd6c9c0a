// ---- drawing, files that are dropped, keys

let running = null; // the AbortController of what is drawn

async function orderOf() {
  const values = settings();
  if (at("watch").checked) values.preview = EVERY;
  return { values, init, mask: hasInit() ? await maskFile() : null };
}

async function drawAll(order, signal) {
  if (at("compare").checked) return drawBoth(order, signal);
  return draw(order, signal, async (event) => {
    await show(await keep(event, order), event.picture === 1, event.pictures > 1);
  });
}

async function submit() {
  if (running) return;
  const controller = running = new AbortController();
  quiet();
  busy(true);
  let said = "the picture is there";
  try {
    await drawAll(await orderOf(), controller.signal);
  } catch (error) {
    said = "stopped";
    if (!controller.signal.aborted) fail(error.message);
  }
  running = null;
  busy(false);
  forming(null);
  at("said").textContent = said;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("stop").addEventListener("click", () => running.abort());

// ---- how a picture was drawn, out of its file

async function recall(file) {
  quiet();
  try {
    const answer = await (await post("parameters", { file: await toBase64(file) })).json();
    fillAll(answer.parameters);
    note([`the settings are those of ${file.name || "the picture"}`, ...answer.notes]);
  } catch (error) {
    fail(`${error.message}. To draw over a picture, drop it on “Start from a picture”`);
  }
}

at("recall").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) recall(file);
});

// ---- files that are dropped

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");

document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  quiet();
  const [file] = event.dataTransfer.files;
  if (!file) return;
  if (at("init-section").contains(event.target)) setInit(file);
  else recall(file);
});

// ---- keys: Enter in the prompt and Ctrl-Enter anywhere draw, Escape ends what is drawn or waits

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape" && running) running.abort();
  const enter = event.key === "Enter" && !event.shiftKey;
  if (!enter || !(event.ctrlKey || event.metaKey || event.target === at("prompt"))) return;
  event.preventDefault();
  form.requestSubmit();
});

greet();
list().catch(() => {
  at("history-count").textContent = "this browser keeps no pictures";
});

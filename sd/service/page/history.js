// ---- the history: the last pictures of this browser, in its IndexedDB

const MOST = 100;
const STORE = "pictures";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("stable-diffusion", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// What `action` asks of the store, when it is done.
async function stored(mode, action) {
  database ??= open();
  const transaction = (await database).transaction(STORE, mode);
  const request = action(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

let database = null;

const all = () => stored("readonly", (store) => store.getAll());

// A picture that was drawn: it is put into the history, and what is too much is dropped. Returns it as it is shown.
async function keep({ png, parameters, times, cut, unknown }, order) {
  const drawn = { blob: fromBase64(png), parameters, times, cut, unknown, init: order.init, mask: order.mask };
  lastSeed = parameters.seed;
  try {
    drawn.id = await stored("readwrite", (store) => store.add(drawn));
    await trim();
    await list();
  } catch {
    at("history-count").textContent = "this browser keeps no more pictures";
  }
  return drawn;
}

async function trim() {
  const ids = await stored("readonly", (store) => store.getAllKeys());
  for (const id of ids.slice(0, Math.max(0, ids.length - MOST))) await stored("readwrite", (store) => store.delete(id));
}

// ---- how it is shown

async function list() {
  const drawn = (await all()).reverse();
  for (const image of at("history").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  at("history").replaceChildren(...drawn.map(entry));
  at("history-count").textContent = drawn.length ? `${drawn.length}, kept by this browser` : "empty";
  at("history-clear").hidden = drawn.length === 0;
}

function entry(drawn) {
  const { parameters } = drawn;
  const file = URL.createObjectURL(drawn.blob);
  const image = made("img", { src: file, alt: "", loading: "lazy" });
  const thumb = made("button", { type: "button", className: "thumb", ariaLabel: `Show: ${parameters.prompt}` }, image);
  thumb.addEventListener("click", () => show(drawn));
  const tools = made("div", { className: "tools" },
    action("Reuse", "Use all of its settings", () => reuse(drawn)),
    action("Seed", "Use its seed", () => setSeed(parameters.seed)),
    download(parameters, file, "Save"));
  const cross = action("×", "Delete", () => forget(drawn.id));
  cross.className = "delete";
  cross.ariaLabel = "Delete";
  return made("li", {}, thumb, cross, made("p", { title: parameters.prompt }, parameters.prompt), tools);
}

function action(text, label, onClick) {
  const button = made("button", { type: "button", textContent: text, title: label });
  button.addEventListener("click", onClick);
  return button;
}

async function reuse({ parameters, init: file, mask: painted }) {
  fillAll(parameters);
  init = file;
  if (file || !at("init-shown").hidden) await showInit();
  if (painted) await readMask(painted);
  at("said").textContent = "its settings are in the form";
}

async function forget(id) {
  await stored("readwrite", (store) => store.delete(id));
  await list();
  at("history-clear").focus();
}

at("history-clear").addEventListener("click", async () => {
  await stored("readwrite", (store) => store.clear());
  await list();
});

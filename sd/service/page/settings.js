// ---- the form's fields: what they say, and how they are filled

const EVERY = 2; // steps between two previews

const fields = () => [...form.elements].filter((element) => element.name);

function valueOf(field) {
  if (field.type === "checkbox") return field.checked || undefined;
  const text = field.value;
  if (text.trim() === "") return undefined;
  return field.type === "number" ? Number(text) : text;
}

// Those that have a place in a request; what only says how a picture is drawn over is left out without one.
function settings() {
  const given = fields().filter((field) => hasInit() || !at("init-shown").contains(field));
  return Object.fromEntries(given.map((field) => [field.name, valueOf(field)]));
}

function fill(field, value) {
  const standing = field.type === "checkbox" ? field.defaultChecked : defaultOf(field);
  if (field.type === "checkbox") field.checked = value ?? standing;
  else field.value = value ?? standing;
  if (field.tagName === "SELECT" && field.selectedIndex < 0) field.value = standing;
}

function defaultOf(field) {
  if (field.tagName !== "SELECT") return field.defaultValue;
  return ([...field.options].find((option) => option.defaultSelected) || field.options[0]).value;
}

// All of a picture's parameters; what it does not name is as it stands when the page is opened.
function fillAll(parameters) {
  const applied = String(parameters.opt ?? "").split(",");
  const known = { ...parameters, opt: offered("opt").find((name) => applied.includes(name)) };
  for (const field of fields()) {
    if (field.name !== "num_images") fill(field, known[field.name]);
  }
  press(at("lock"), form.elements.seed.value !== "");
  sizeFromSides();
}

function offered(name) {
  return [...form.elements[name].options].map((option) => option.value).filter(Boolean);
}

// ---- size

function sizeFromSides() {
  const { width, height } = form.elements;
  const own = !width.value && !height.value;
  const size = `${width.value}x${height.value}`;
  const known = [...at("size").options].find((option) => own ? !option.value : option.dataset.size === size);
  at("size").value = known ? known.value : "own";
  sidesFromSize();
}

function sidesFromSize() {
  at("sides").hidden = at("size").value !== "own";
  if (at("size").value === "own") return;
  const [width, height] = at("size").value.split("x");
  form.elements.width.value = width;
  form.elements.height.value = height ?? "";
}

at("size").addEventListener("change", sidesFromSize);

// ---- the seed: empty is another one each time

let lastSeed = null; // of the picture drawn last

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function setSeed(seed) {
  form.elements.seed.value = seed ?? "";
  press(at("lock"), form.elements.seed.value !== "");
}

at("dice").addEventListener("click", () => setSeed(randomSeed()));
at("lock").addEventListener("click", () => setSeed(isPressed(at("lock")) ? null : lastSeed ?? randomSeed()));
form.elements.seed.addEventListener("input", () => press(at("lock"), form.elements.seed.value !== ""));

// ---- LoRA: named in the prompt, as AUTOMATIC1111's web UI does

function addLora() {
  const weight = at("lora-weight").valueAsNumber;
  if (Number.isNaN(weight)) return;
  form.elements.prompt.value = `${form.elements.prompt.value.trimEnd()} <lora:${at("lora").value}:${weight}>`.trimStart();
  form.elements.prompt_syntax.value = "a1111";
  at("said").textContent = `${at("lora").value} is in the prompt`;
}

at("lora-add").addEventListener("click", addLora);
at("lora-section").hidden = at("lora").options.length === 0;
at("opt-field").hidden = offered("opt").length === 0;

// What is wrong in a closed section can be seen, or the browser could not say so.
form.addEventListener("invalid", (event) => {
  for (let part = event.target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
  if (at("sides").contains(event.target)) at("sides").hidden = false;
}, true);

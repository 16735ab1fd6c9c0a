// ---- two settings, one seed: what the second one costs, and what it saves

const SAME = "="; // in a list: as the first
const COMPARED = ["opt", "steps", "cfg_scale", "sampler", "schedule"];

// The second's fields are copies of the first's, empty: so there is one table of what they take.
function copyFields() {
  for (const name of COMPARED) {
    const label = form.elements[name].closest("label").cloneNode(true);
    const field = label.querySelector("input, select");
    field.removeAttribute("name");
    field.required = false;
    field.dataset.second = name;
    if (field.tagName === "SELECT") field.prepend(made("option", { value: SAME, textContent: "as the first" }));
    else field.placeholder = "as the first";
    field.value = field.tagName === "SELECT" ? SAME : "";
    label.removeAttribute("id");
    at("second").append(label);
  }
}

function secondSettings() {
  const given = [...at("second").querySelectorAll("[data-second]")].filter((field) => !["", SAME].includes(field.value));
  const schedule = at("second").querySelector("[data-second=schedule]");
  if (schedule.value === "") given.push(schedule); // its own
  return Object.fromEntries(given.map((field) => [field.dataset.second, valueOf(field)]));
}

// The names whose values differ; throws where none does.
function differences(first, second) {
  const names = COMPARED.filter((name) => first[name] !== second[name]);
  if (!names.length) throw new Error("the second settings are the first ones: change one of them under “Compare two settings”");
  return names;
}

async function drawBoth(order, signal) {
  const seed = order.values.seed ?? randomSeed();
  const first = { ...order, values: { ...order.values, seed, num_images: 1 } };
  const second = { ...first, values: { ...first.values, ...secondSettings() } };
  const names = differences(first.values, second.values);
  const pair = [];
  for (const [one, name] of [[first, "first, "], [second, "second, "]]) {
    await draw(one, signal, async (event) => pair.push(await keep(event, one)), name);
  }
  await showPair(pair, names, [first.values, second.values]);
}

// ---- the pair

async function showPair(pair, names, values) {
  clear();
  const images = [at("first-image"), at("second-image")];
  pair.forEach((drawn, i) => showFile(images[i], drawn.blob));
  await Promise.all(images.map((image) => image.decode()));
  const captions = [at("first-caption"), at("second-caption")];
  pair.forEach((drawn, i) => captions[i].replaceChildren(...side(drawn, names, values[i], images[i].src, `Download the ${i ? "second" : "first"}`)));
  at("verdict").textContent = verdict(pair.map((drawn) => seconds(drawn.times)), decibels(...images));
  at("comparison").hidden = false;
  forming(null);
  slide(50);
  at("comparison").scrollIntoView({ block: "nearest" });
}

function side(drawn, names, values, file, link) {
  const facts = names.map((name) => `${labelOf(name)} ${values[name] ?? form.elements[name].options[0].text}`);
  const text = `${facts.join(" · ")} · ${seconds(drawn.times).toFixed(1)} s`;
  return [text, download(drawn.parameters, file, link)];
}

function labelOf(name) {
  return form.elements[name].closest("label").firstChild.textContent.trim().toLowerCase();
}

function verdict([first, second], distance) {
  const faster = first >= second;
  const times = (faster ? first / second : second / first).toFixed(1);
  const pace = times === "1.0" ? "as fast" : `${times} times ${faster ? "as fast" : "as long"}`;
  const near = distance === Infinity ? "the same pixels" : `${distance.toFixed(0)} dB from the first`;
  return `The second: ${pace}, ${near}`;
}

// The peak signal-to-noise ratio: 20 is another picture, from 40 on the difference can hardly be seen.
function decibels(one, other) {
  const [a, b] = [one, other].map(pixelsOf);
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] - b[i]) ** 2; // alpha is 255 in both
  return sum === 0 ? Infinity : 10 * Math.log10(255 ** 2 / (sum / (a.length * 3 / 4)));
}

function pixelsOf(image) {
  const canvas = made("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

function slide(share) {
  at("slider").value = share;
  at("slider").setAttribute("aria-valuetext", `${share}% the first, the rest the second`);
  at("pair").style.setProperty("--at", `${share}%`);
}

at("slider").addEventListener("input", () => slide(at("slider").value));
copyFields();

// ---- the mask: what is painted over the picture is drawn anew
//
// All that was done is kept as a list and drawn again from its beginning, so that each of it can be undone. A position
// and the brush's size are shares of the picture's width: what is painted does not depend on the size that is shown.

const MASK_SIDE = 1024; // pixels, at most; the server takes a mask of any size

let done = []; // {points, size, erase}, {file: an ImageBitmap} or {clear: true}
let keyboard = { x: 0.5, y: 0.5 };

const mask = at("mask");

function newMask(image) {
  const scale = Math.min(1, MASK_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  mask.width = Math.max(1, Math.round(image.naturalWidth * scale));
  mask.height = Math.max(1, Math.round(image.naturalHeight * scale));
  keyboard = { x: 0.5, y: mask.height / mask.width / 2 };
  done = [];
  drawMask();
}

// ---- drawing it

function drawMask() {
  const context = mask.getContext("2d");
  context.clearRect(0, 0, mask.width, mask.height);
  for (const one of done) drawOne(context, one);
  at("undo").disabled = at("mask-clear").disabled = done.length === 0;
}

function drawOne(context, one) {
  if (one.clear) context.clearRect(0, 0, mask.width, mask.height);
  else if (one.file) context.drawImage(one.file, 0, 0, mask.width, mask.height);
  else drawStroke(context, one);
}

function drawStroke(context, { points, size, erase }) {
  const [first, ...others] = points.map(({ x, y }) => [x * mask.width, y * mask.width]);
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--mask");
  context.save();
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.fillStyle = context.strokeStyle = colour;
  context.lineWidth = size * mask.width;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.arc(...first, context.lineWidth / 2, 0, 2 * Math.PI); // a line from a point to itself is not drawn
  context.fill();
  context.beginPath();
  context.moveTo(...first);
  for (const point of others) context.lineTo(...point);
  context.stroke();
  context.restore();
}

// White where it is painted, on black, and nothing between: read again it is the same. null where nothing is painted.
async function maskFile() {
  const image = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
  let empty = true;
  for (let i = 0; i < image.data.length; i += 4) {
    const shade = image.data[i + 3] >= 128 ? 255 : 0;
    image.data.set([shade, shade, shade, 255], i);
    if (shade) empty = false;
  }
  if (empty) return null;
  const canvas = made("canvas", { width: mask.width, height: mask.height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return toPng(canvas);
}

// A black and white picture as a mask: its white is painted.
async function readMask(file) {
  const canvas = made("canvas", { width: mask.width, height: mask.height });
  const context = canvas.getContext("2d");
  context.drawImage(await createImageBitmap(file), 0, 0, mask.width, mask.height);
  const image = context.getImageData(0, 0, mask.width, mask.height);
  const painted = paintedPixel(context);
  for (let i = 0; i < image.data.length; i += 4) {
    const [red, green, blue, alpha] = image.data.subarray(i, i + 4);
    const white = (0.299 * red + 0.587 * green + 0.114 * blue) * alpha / 255 >= 128;
    image.data.set(white ? painted : [0, 0, 0, 0], i);
  }
  done.push({ file: await createImageBitmap(image) });
  drawMask();
}

// The colour of the brush, as bytes.
function paintedPixel(context) {
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--mask");
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data;
}

// ---- the brush

const brush = () => ({ size: at("brush").valueAsNumber / 100, erase: isPressed(at("erase")) });

function begin(point) {
  done.push({ points: [point], ...brush() });
  drawMask();
}

function place(event) {
  const box = mask.getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.width };
}

mask.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  mask.setPointerCapture(event.pointerId);
  begin(place(event));
});
mask.addEventListener("pointermove", (event) => {
  if (!mask.hasPointerCapture(event.pointerId)) return;
  done.at(-1).points.push(place(event));
  drawMask();
});

function choose(erase) {
  press(at("paint"), !erase);
  press(at("erase"), erase);
}

at("paint").addEventListener("click", () => choose(false));
at("erase").addEventListener("click", () => choose(true));
at("undo").addEventListener("click", () => {
  done.pop();
  drawMask();
});
at("mask-clear").addEventListener("click", () => {
  done.push({ clear: true });
  drawMask();
});
at("mask-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) await readMask(file).catch(() => fail(`${file.name} cannot be read as a picture`));
});

// ---- the same by keyboard

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function showCursor(shown) {
  at("cursor").hidden = !shown;
  at("cursor").style.left = `${keyboard.x * 100}%`;
  at("cursor").style.top = `${keyboard.y * 100 * mask.width / mask.height}%`;
  at("cursor").style.width = `${brush().size * 100}%`;
}

mask.addEventListener("keydown", (event) => {
  const step = ARROWS[event.key];
  if (step) {
    const far = event.shiftKey ? 0.1 : 0.02;
    keyboard.x = Math.min(1, Math.max(0, keyboard.x + step[0] * far));
    keyboard.y = Math.min(mask.height / mask.width, Math.max(0, keyboard.y + step[1] * far));
  } else if (event.key === " ") begin({ ...keyboard });
  else return;
  event.preventDefault();
  showCursor(true);
});
mask.addEventListener("blur", () => showCursor(false));

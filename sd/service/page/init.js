// ---- the picture to start from: dropped, pasted or chosen

const LONGEST = 2048; // pixels of a side of a picture that is made smaller to be sent

let init = null; // its file, as it will be sent

const hasInit = () => init !== null;

async function setInit(file) {
  try {
    init = await sendable(file);
  } catch {
    init = null;
    fail(`${file.name || "it"} cannot be read as a picture`);
  }
  await showInit();
}

// The mask is there before it can be painted on.
async function showInit() {
  at("init-section").open = true;
  showFile(at("init-image"), init);
  if (hasInit()) {
    await at("init-image").decode();
    newMask(at("init-image"));
  } else at("init-note").textContent = "";
  at("init-empty").hidden = hasInit();
  at("init-shown").hidden = !hasInit();
}

// The file itself, if this browser can read it and the server takes so many bytes; else a smaller copy of it.
async function sendable(file) {
  const picture = await createImageBitmap(file);
  at("init-note").textContent = "";
  if (file.size * 4 / 3 < limits.max_body / 2) return file;
  const scale = Math.min(1, LONGEST / Math.max(picture.width, picture.height));
  const canvas = made("canvas", { width: Math.round(picture.width * scale), height: Math.round(picture.height * scale) });
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  at("init-note").textContent = `Made smaller to be sent: ${canvas.width} × ${canvas.height}.`;
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

async function removeInit() {
  init = null;
  await showInit();
  at("init-file").focus();
}

at("init-file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) setInit(file);
});
at("init-remove").addEventListener("click", removeInit);
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  quiet();
  setInit(file);
});

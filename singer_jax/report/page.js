"use strict";
// Draws the maps of patches from the embedded data; a click on a patch shows what is similar to it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.models) return;

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const colours = {};
  for (const [name, text] of Object.entries(data.colours)) colours[name] = bytes(text);
  for (const model of data.models) {
    model.patches = model.grid[0] * model.grid[1];
    for (const kind of ["norm", "cosine", "similarity", "pca"]) {
      model[kind] = model[kind] === null ? null : bytes(model[kind]);
    }
  }
  // Label, explanation, colour map, and the ends of its scale.
  const quantities = {
    norm: ["patch norm", "Norms are divided by the model's median, so that one scale fits all models.",
      "viridis", "0", `${data.largest.toFixed(1)} x median`],
    cosine: ["cosine to the teacher", "Cosine similarity to the teacher's token of the same patch. " +
      "The student's tokens are mapped to the teacher's by a linear map.", "magma", "0", "1"],
    similarity: ["similarity to the chosen patch", "Cosine similarity to the chosen patch, which is " +
      "framed in the input.", "magma", "0", "1"],
    pca: ["principal components", "The first three principal components of the tokens of all shown " +
      "images, as red, green and blue.", null, "", ""],
  };
  // The chosen patch is a point of the image, because grids may differ.
  const state = { image: 0, quantity: "norm", point: [0.5, 0.5] };

  const button = (parent, content, pressed, action) => {
    const element = document.createElement("button");
    element.append(content);
    element.setAttribute("aria-pressed", pressed);
    element.addEventListener("click", action);
    parent.append(element);
  };

  const patchOf = (model) => {
    const [rows, columns] = model.grid;
    const row = Math.min(rows - 1, Math.floor(state.point[1] * rows));
    const column = Math.min(columns - 1, Math.floor(state.point[0] * columns));
    return row * columns + column;
  };

  const colourOf = (model, patch) => {
    const index = state.image * model.patches + patch;
    if (state.quantity === "pca") return model.pca.subarray(3 * index, 3 * index + 3);
    if (state.quantity === "similarity") {
      const start = (state.image * model.patches + patchOf(model)) * model.patches;
      const value = model.similarity[start + patch];
      return colours.magma.subarray(3 * value, 3 * value + 3);
    }
    const values = model[state.quantity];
    return colours[quantities[state.quantity][2]].subarray(3 * values[index], 3 * values[index] + 3);
  };

  const figure = (name, rows, columns) => {
    const element = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    canvas.dataset.model = name;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", name);
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      state.point = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      state.quantity = "similarity";
      draw();
    });
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    element.append(canvas, caption);
    document.getElementById("maps").append(element);
    return canvas.getContext("2d");
  };

  // Small inputs are enlarged, so that the frame around the chosen patch stays thin.
  const zoom = Math.ceil(224 / data.size[0]);
  const [inputHeight, inputWidth] = data.size.map((side) => side * zoom);
  const input = figure("input", inputHeight, inputWidth);
  const contexts = data.models.map((model) => figure(model.name, model.grid[0], model.grid[1]));
  const pictures = data.pixels.map((source) => {
    const picture = new Image();
    picture.src = source;
    return picture;
  });

  function draw() {
    const images = document.getElementById("images");
    images.replaceChildren();
    data.pixels.forEach((source, index) => {
      const small = new Image();
      small.src = source;
      small.alt = `image ${index + 1}`;
      button(images, small, index === state.image, () => { state.image = index; draw(); });
    });
    const choices = document.getElementById("quantities");
    choices.replaceChildren();
    for (const [kind, [label]] of Object.entries(quantities)) {
      button(choices, label, kind === state.quantity, () => { state.quantity = kind; draw(); });
    }
    const [, explanation, map, low, high] = quantities[state.quantity];
    document.getElementById("explanation").textContent = explanation;
    const scale = document.getElementById("scale");
    scale.hidden = map === null;
    if (map !== null) {
      const stops = Array.from({ length: 17 }, (_, stop) => Math.min(255, 16 * stop))
        .map((value) => `rgb(${colours[map].subarray(3 * value, 3 * value + 3).join(",")})`);
      scale.children[0].textContent = low;
      scale.children[1].style.background = `linear-gradient(to right, ${stops.join(",")})`;
      scale.children[2].textContent = high;
    }

    const picture = pictures[state.image];
    const show = () => {
      input.imageSmoothingEnabled = false;
      input.drawImage(picture, 0, 0, inputWidth, inputHeight);
      if (state.quantity !== "similarity") return;
      const [rows, columns] = data.models[0].grid;
      const patch = patchOf(data.models[0]);
      const height = inputHeight / rows;
      const width = inputWidth / columns;
      input.strokeStyle = "#ff2d55";
      input.lineWidth = inputHeight / 75;
      input.strokeRect((patch % columns) * width, Math.floor(patch / columns) * height, width, height);
    };
    if (picture.complete) show(); else picture.addEventListener("load", show, { once: true });

    data.models.forEach((model, which) => {
      // The teacher has no cosine to itself; neither has a student with another grid of patches.
      const drawn = state.quantity !== "cosine" || model.cosine !== null;
      contexts[which].canvas.parentElement.hidden = !drawn;
      if (!drawn) return;
      const [rows, columns] = model.grid;
      const pixels = contexts[which].createImageData(columns, rows);
      for (let patch = 0; patch < model.patches; patch += 1) {
        pixels.data.set([...colourOf(model, patch), 255], 4 * patch);
      }
      contexts[which].putImageData(pixels, 0, 0);
    });
  }
  draw();
})();

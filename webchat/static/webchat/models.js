/** The model picker: what can be asked, and how each one is, now. */

import * as api from "./api.js";
import { byId, element } from "./dom.js";
import { attachMenu } from "./menu.js";

const WORDS = { ready: "ready", starting: "starting", degraded: "partly down", failed: "down", stopped: "stopped" };
const SOON_MS = 3_000;
const LATER_MS = 30_000;

export class ModelPicker {
  /** @param {(name: string) => void} onChoose */
  constructor(onChoose, onError) {
    this.models = null;
    this.chosen = null;
    this.onError = onError;
    this.button = byId("model-button");
    this.menu = attachMenu(
      this.button,
      () => this.items((name) => {
        this.choose(name);
        onChoose(name);
      }),
      { onOpen: () => this.poll(), empty: "There is no model yet." },
    );
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.poll();
    });
  }

  /** Menu items for all models; the current one is checked. */
  items(choose, current = this.chosen) {
    return (this.models ?? []).map((model) => ({
      label: element(
        "span",
        { class: "model-line" },
        stateDot(model.state),
        element("span", { class: "model-name" }, model.name),
        element("span", { class: "model-detail" }, describe(model)),
      ),
      checked: model.name === current,
      choose: () => choose(model.name),
    }));
  }

  get current() {
    return this.models?.find(({ name }) => name === this.chosen) ?? null;
  }

  choose(name) {
    this.chosen = name;
    this.show();
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      this.models = await api.models();
      if (!this.chosen && this.models.length) {
        this.chosen = (this.models.find(({ state }) => state === "ready") ?? this.models[0]).name;
      }
      this.show();
      if (this.menu.isOpen) this.menu.fill();
    } catch (error) {
      this.onError(error);
    }
    const soon = this.menu.isOpen || this.current?.state !== "ready";
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), soon ? SOON_MS : LATER_MS);
  }

  show() {
    const model = this.current;
    const known = this.models !== null;
    const state = model?.state ?? (known ? "stopped" : "unknown");
    this.button.replaceChildren(
      stateDot(state),
      element("span", { class: "model-name" }, this.chosen ?? (known ? "No model" : "Models")),
      ...(model && state !== "ready" ? [element("span", { class: "model-detail" }, describe(model))] : []),
      ...(!model && known && this.chosen ? [element("span", { class: "model-detail" }, "no longer served")] : []),
      element("span", { class: "chevron", "aria-hidden": "true" }),
    );
    this.button.setAttribute("aria-label", `Model: ${this.chosen ?? "none"}${model ? `, ${describe(model)}` : ""}`);
    byId("no-models").hidden = !(known && this.models.length === 0);
  }
}

function describe(model) {
  return model.state === "ready" ? WORDS.ready : model.detail || WORDS[model.state] || model.state;
}

function stateDot(state) {
  return element("span", { class: `dot dot-${state in WORDS ? state : "stopped"}`, "aria-hidden": "true" });
}

/** The panel of one conversation: system prompt, temperature, top p, longest answer. */

import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens"];

export class Settings {
  /** @param {(settings: object) => Promise<void>} onChange */
  constructor(onChange) {
    this.form = byId("settings-form");
    this.panel = byId("settings");
    this.saved = byId("settings-saved");
    this.button = byId("open-settings");
    this.button.addEventListener("click", () => this.open(this.panel.hidden));
    byId("close-settings").addEventListener("click", () => this.open(false));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => {
      this.saved.textContent = "";
    });
    this.form.addEventListener("change", async () => {
      if (!this.form.reportValidity()) return;
      this.mark();
      this.saved.textContent = (await onChange(this.value)) ? "Saved" : "";
    });
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  open(open) {
    this.panel.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    if (open) this.form.elements.system.focus();
    else this.button.focus();
  }

  /** Only what was set: for the rest the model's own defaults hold. */
  get value() {
    const { elements } = this.form;
    const value = {};
    if (elements.system.value.trim()) value.system = elements.system.value;
    for (const name of NUMBERS) if (elements[name].value !== "") value[name] = Number(elements[name].value);
    return value;
  }

  set value(settings) {
    const { elements } = this.form;
    for (const name of ["system", ...NUMBERS]) elements[name].value = settings?.[name] ?? "";
    this.saved.textContent = "";
    this.mark();
  }

  mark() {
    this.button.classList.toggle("in-use", Object.keys(this.value).length > 0);
  }
}

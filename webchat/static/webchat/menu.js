/** A button that opens a menu: arrow keys, Home, End, Escape, a click elsewhere. */

import { element } from "./dom.js";

let openMenu = null;

/**
 * @param {HTMLButtonElement} button
 * @param {() => Array<{label: string|Node, checked?: boolean, danger?: boolean, choose: () => void}>} items
 * @param {{onOpen?: () => void, empty?: string}} options
 */
export function attachMenu(button, items, options = {}) {
  const menu = element("div", { class: "menu", role: "menu", hidden: true, "aria-label": button.ariaLabel });
  button.setAttribute("aria-haspopup", "menu");
  button.setAttribute("aria-expanded", "false");
  button.after(menu);

  const entries = () => [...menu.querySelectorAll("[role^=menuitem]")];
  const control = {
    get isOpen() {
      return !menu.hidden;
    },
    close(focus = false) {
      menu.hidden = true;
      button.setAttribute("aria-expanded", "false");
      if (openMenu === control) openMenu = null;
      if (focus) button.focus();
    },
    open() {
      openMenu?.close();
      openMenu = control;
      control.fill();
      menu.hidden = false;
      button.setAttribute("aria-expanded", "true");
      // Upwards where there is no room below.
      menu.classList.remove("upwards");
      menu.classList.toggle("upwards", menu.getBoundingClientRect().bottom > innerHeight - 8);
      (entries().find((entry) => entry.ariaChecked === "true") ?? entries()[0])?.focus();
      options.onOpen?.();
    },
    /** Show the items as they are now, the focus kept. */
    fill() {
      const at = entries().indexOf(document.activeElement);
      const made = items().map(({ label, checked, danger, choose }) =>
        element(
          "button",
          {
            type: "button",
            class: danger ? "menu-item danger" : "menu-item",
            role: checked === undefined ? "menuitem" : "menuitemradio",
            "aria-checked": checked === undefined ? null : String(checked),
            tabindex: "-1",
            on: {
              click: (event) => {
                event.stopPropagation();
                control.close(true);
                choose();
              },
            },
          },
          label,
        ),
      );
      menu.replaceChildren(...(made.length ? made : [element("p", { class: "menu-empty" }, options.empty ?? "")]));
      if (at >= 0) entries()[Math.min(at, made.length - 1)]?.focus();
    },
  };

  button.addEventListener("click", (event) => {
    event.stopPropagation();
    if (control.isOpen) control.close();
    else control.open();
  });
  menu.addEventListener("keydown", (event) => {
    const all = entries();
    const at = all.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      all[(to + all.length) % all.length]?.focus();
    } else if (event.key === "Tab") {
      control.close();
    }
  });
  return control;
}

document.addEventListener("click", () => openMenu?.close());

/** Close what is open; true when there was something. */
export function closeMenus() {
  if (!openMenu) return false;
  openMenu.close(true);
  return true;
}

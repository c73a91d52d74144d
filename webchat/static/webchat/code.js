/** Code blocks: a head with the language and a copy button, and colours once the block is complete. */

import highlighter from "../vendor/highlight.js-11.12.0/core.min.js";
import { copyButton, element } from "./dom.js";
import { fragment } from "./markdown.js";

const VENDOR = "../vendor/highlight.js-11.12.0/languages";
const LANGUAGES = new Set(
  ("bash c cpp csharp css diff dockerfile go graphql ini java javascript json kotlin lua makefile markdown " +
    "nginx perl php plaintext powershell python r ruby rust scala shell sql swift typescript xml yaml").split(" "),
);
const ALIASES = {
  "c#": "csharp", "c++": "cpp", cs: "csharp", console: "shell", docker: "dockerfile", golang: "go", h: "c",
  html: "xml", htm: "xml", hpp: "cpp", js: "javascript", jsx: "javascript", kt: "kotlin", md: "markdown",
  mjs: "javascript", patch: "diff", ps1: "powershell", py: "python", rb: "ruby", rs: "rust", sh: "bash",
  svg: "xml", text: "plaintext", toml: "ini", ts: "typescript", tsx: "typescript", txt: "plaintext",
  yml: "yaml", zsh: "bash",
};
// Longer ones stay plain: colouring them would hold up the page.
const LONGEST = 100_000;

/** Put the head on every bare block in a rendered part. */
export function decorate(root) {
  for (const pre of root.querySelectorAll("pre[data-language]")) frame(pre);
}

/** A bare `<pre><code>` in place → a framed one. Returns the frame. */
export function frame(pre) {
  const code = pre.firstElementChild;
  const box = element("div", { class: "code" });
  pre.replaceWith(box);
  box.append(
    element(
      "div",
      { class: "code-head" },
      element("span", { class: "code-language" }, pre.dataset.language || "text"),
      copyButton("Copy code", () => code.textContent.replace(/\n$/, "")),
    ),
    pre,
  );
  // Long lines scroll: that must work from the keyboard too.
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", `Code, ${pre.dataset.language || "text"}`);
  return box;
}

/** Colour the complete blocks of a part. The language is what the fence says, never guessed. */
export async function highlight(root) {
  for (const pre of root.querySelectorAll("pre[data-language]")) {
    const named = pre.dataset.language.toLowerCase();
    const language = ALIASES[named] ?? named;
    const code = pre.firstElementChild;
    const source = code.textContent;
    if (!LANGUAGES.has(language) || source.length > LONGEST || code.childElementCount) continue;
    if (!highlighter.getLanguage(language)) {
      try {
        highlighter.registerLanguage(language, (await import(`${VENDOR}/${language}.min.js`)).default);
      } catch {
        continue; // without colours it can be read as well
      }
    }
    code.replaceChildren(fragment(highlighter.highlight(source, { language, ignoreIllegals: true }).value));
  }
}

/**
 * The one way from a model's text to the page: Markdown → sanitiser → DOM.
 *
 * Raw HTML in the text stays text. Whatever the renderer makes is sanitised once more, and what comes out
 * is a Trusted Type: the page's policy lets nothing else become HTML.
 */

import createMarkdown from "../vendor/markdown-it-15.0.3/markdown-it.esm.min.mjs";
import purify from "../vendor/dompurify-3.4.18/purify.es.mjs";

const SANITISER = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
    "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "data-language", "href", "start", "title"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  // A link leads to another site or to a mail, never to a page or an action of this one.
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  // These are no addresses: the line above is not about them.
  ADD_URI_SAFE_ATTR: ["data-language", "start"],
  RETURN_TRUSTED_TYPE: true,
};

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A" && node.hasAttribute("href")) {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

const markdown = createMarkdown({ html: false, linkify: true, breaks: false });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
const { escapeHtml } = markdown.utils;
const { rules } = markdown.renderer;

/** The language that a fence names, as a short plain word, or "". */
export function fenceLanguage(token) {
  return (token.info.trim().split(/\s+/)[0] ?? "").replace(/[^\w+#.-]/g, "").slice(0, 30);
}

rules.fence = (tokens, at) =>
  `<pre data-language="${escapeHtml(fenceLanguage(tokens[at]))}"><code>${escapeHtml(tokens[at].content)}</code></pre>`;
rules.code_block = (tokens, at) =>
  `<pre data-language=""><code>${escapeHtml(tokens[at].content)}</code></pre>`;

// A remote image would tell its server that, and when, this chat is read: it is a link instead.
rules.image = (tokens, at, options, env, renderer) => {
  const alt = renderer.renderInlineAsText(tokens[at].children ?? [], options, env);
  const source = tokens[at].attrGet("src") ?? "";
  return `<a href="${escapeHtml(source)}">Image: ${escapeHtml(alt || source)}</a>`;
};

// The renderer aligns cells with style attributes, which the page's policy refuses.
for (const name of ["th_open", "td_open"]) {
  rules[name] = (tokens, at, options, env, renderer) => {
    const style = tokens[at].attrs?.find(([attribute]) => attribute === "style");
    if (style) {
      tokens[at].attrs = [["class", style[1].replace("text-align:", "align-")]];
    }
    return renderer.renderToken(tokens, at, options);
  };
}

/** HTML of ours or of a library → a fragment without anything that could act. */
export function fragment(html) {
  const template = document.createElement("template");
  template.innerHTML = purify.sanitize(html, SANITISER);
  return template.content;
}

export function parse(source, env) {
  return markdown.parse(source, env);
}

export function render(tokens, env) {
  return fragment(markdown.renderer.render(tokens, markdown.options, env));
}

// What is shown of a run and of its clips. `element`, `server` and `trigger` are Gradio's.
const $ = (query, root = element) => root.querySelector(query);
const STAGES = { encode_text: 'Read prompt', denoise: 'Denoise', decode: 'Decode', save: 'Write file' };
const stageOf = name => (name === 'prepare_latents' ? 'denoise' : name);
const seconds = s => (s < 9.95 ? s.toFixed(1) : Math.round(s)) + ' s';
const total = clip => Object.values(clip.seconds).reduce((sum, s) => sum + s, 0);
const moves = () => !matchMedia('(prefers-reduced-motion: reduce)').matches;

function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? '' : value);
  made.append(...children.flat().filter(child => child != null && child !== false));
  return made;
}

// A contact sheet, one row of frames with gaps of 4 pixels, played as a moving picture.
function preview(png, ratio) {
  const head = atob(png.slice(0, 44));
  const number = at => [0, 1, 2, 3].reduce((n, i) => n * 256 + head.charCodeAt(at + i), 0);
  const [width, height] = [number(16), number(20)];
  const side = (height - 4) * ratio, count = Math.max(1, Math.round(width / (side + 4)));
  const still = moves() ? '' : 'animation: none;';
  const style = `--w:${(100 * width) / side}%; --x:${-400 / width}%; --y:${-400 / height}%; ${still}
    animation-timing-function: steps(${count}); animation-delay: ${-(Date.now() % 2000)}ms`;
  return h('div', { class: 'moving', style: `aspect-ratio: ${ratio}` },
    h('img', { src: 'data:image/png;base64,' + png, style, alt: 'The clip so far' }));
}

function playable(clip, options = {}) {
  const { width, height, prompt } = clip.recipe.request;
  return h('video', {
    src: 'gradio_api/file=' + clip.path, loop: true, playsinline: true, width, height,
    style: `aspect-ratio: ${width / height}`, 'aria-label': prompt, ...options,
    onloadeddata: event => { event.target.muted = true; if (options.autoplay && moves()) event.target.play().catch(() => {}); },
  });
}

function bar(clip, longest = total(clip)) {
  const parts = Object.entries(clip.seconds).filter(([name]) => STAGES[name]);
  return h('div', { class: 'bar' },
    h('div', { class: 'track', 'aria-hidden': 'true', style: `width: ${(100 * total(clip)) / longest}%` },
      parts.map(([name, s]) => h('i', { class: name, style: `flex-grow: ${s}` }))),
    h('ul', {}, parts.map(([name, s]) => h('li', { class: name }, STAGES[name] + ' ' + seconds(s)))));
}

function kept(clip) {
  const found = Object.entries(clip.kept);
  if (!found.length) return null;
  const right = found.filter(([, is]) => is).length;
  return h('p', { class: 'kept', title: 'Read back from the frames by the program that drew the training clips' },
    h('b', {}, `${right} of ${found.length} right`),
    found.map(([name, is]) => h('span', { class: is ? 'yes' : 'no' }, (is ? '✓ ' : '✗ ') + name)));
}

const slug = text => text.toLowerCase().replace(/[^a-z0-9]+/g, '-').slice(0, 40).replace(/^-|-$/g, '') || 'clip';

function facts(clip, actions, longest) {
  const { request } = clip.recipe, length = request.num_frames / request.fps;
  const words = [clip.model, clip.recipe.decoder && `${clip.recipe.decoder.name_or_path} decoder`, `${request.num_inference_steps} steps`,
    request.guidance_scale !== 1 && `guidance ${request.guidance_scale}`, `${request.width}×${request.height}`,
    `${length.toFixed(1)} s of video`, `seed ${request.seed}`, ...request.lora.map(one => `${one.path} ${one.strength}`)];
  return h('article', {},
    h('h2', {}, request.prompt),
    h('p', { class: 'words' }, words.filter(Boolean).map(word => h('span', {}, word))),
    h('p', { class: 'took' }, h('b', {}, seconds(total(clip))), ' to make'),
    bar(clip, longest), kept(clip),
    clip.notices.map(text => h('p', { class: 'notice' }, text)),
    h('p', { class: 'actions' },
      h('a', { class: 'quiet', href: 'gradio_api/file=' + clip.path, download: `${slug(request.prompt)}-${request.seed}.mp4` }, 'Download'),
      actions.map(([text, act]) => h('button', { type: 'button', class: 'quiet', onclick: act }, text))),
    h('details', {}, h('summary', {}, 'Recipe'), h('pre', { tabindex: 0 }, JSON.stringify(clip.recipe, null, 2))));
}

// One clip plays by itself; two play in step, the shorter one holding its last frame.
function show(clips, actionsOf) {
  const screen = $('.screen'), longest = Math.max(...clips.map(total));
  screen.dataset.state = clips.length > 1 ? 'two' : 'one';
  const videos = clips.map(clip => playable(clip, clips.length > 1 ? { muted: true } : { autoplay: true, muted: true, controls: true }));
  screen.replaceChildren(...videos.map((video, i) => clips.length > 1
    ? h('figure', {}, video, h('figcaption', {}, 'AB'[i] + ' · ' + clips[i].model + ' · ' + seconds(total(clips[i])))) : video));
  $('.facts').replaceChildren(...clips.map(clip => facts(clip, actionsOf(clip), longest)));
  if (clips.length > 1) screen.append(inStep(videos));
}

function inStep(videos) {
  const length = () => Math.max(...videos.map(video => video.duration || 0));
  let at = 0, playing = moves(), before = performance.now();
  const button = h('button', { type: 'button', class: 'quiet', onclick: () => { playing = !playing; } });
  const slider = h('input', { type: 'range', min: 0, max: 1, step: 'any', value: 0, 'aria-label': 'Position in both clips',
    oninput: () => { playing = false; at = slider.value * length(); } });
  videos.forEach(video => { video.loop = false; });
  requestAnimationFrame(function tick(now) {
    if (!slider.isConnected) { if (at || now - before > 1000) return; return requestAnimationFrame(tick); }
    const end = length(), all = end > 0 && videos.every(video => video.readyState >= 2);
    if (playing && all) at = (at + (now - before) / 1000) % end;
    before = now;
    for (const video of videos) {
      const wanted = Math.min(at, (video.duration || 0) - 0.01);
      const moving = playing && all && at < video.duration - 0.05;
      if (moving && video.paused) video.play().catch(() => {});
      if (!moving && !video.paused) video.pause();
      if (wanted >= 0 && Math.abs(video.currentTime - wanted) > (moving ? 0.12 : 0.03) && !video.seeking) video.currentTime = wanted;
    }
    button.textContent = playing ? 'Pause both' : 'Play both';
    slider.value = end ? at / end : 0;
    requestAnimationFrame(tick);
  });
  return h('div', { class: 'transport' }, button, slider);
}

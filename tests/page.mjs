// node page.mjs MODULES URL_WITH_TOKEN [FOLDER_FOR_SCREENSHOTS]: the status page in chromium; one JSON line says what is
// wrong with it. MODULES: the folder whose node_modules hold puppeteer-core and axe-core.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [modules, url, folder] = process.argv.slice(2);
const require = createRequire(`${modules}/package.json`);
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const SHOWN = "#groups .body:not([hidden])";
const result = { violations: [], console: [], retried: false, overflow: false };
const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu"],
});
try {
    const page = await browser.newPage();
    // axe is injected by the browser's protocol, which no Content-Security-Policy concerns
    page.on("console", (message) => ["error", "warn"].includes(message.type()) && result.console.push(message.text()));
    page.on("pageerror", (error) => result.console.push(String(error)));
    page.on("dialog", (dialog) => (result.console.push(`dialog: ${dialog.message()}`), dialog.dismiss()));
    await page.evaluateOnNewDocument(() =>
        addEventListener("securitypolicyviolation", (event) => console.error(`CSP: ${event.violatedDirective}`)),
    );
    await page.setViewport({ width: 1280, height: 900 });
    await page.goto(url);
    await page.waitForSelector("#figures:not([hidden])", { timeout: 15_000 });
    if (page.url().includes("token")) result.console.push("the token stayed in the address");
    await page.evaluate(axe);
    const looks = [["light", 1280], ["dark", 1280], ["light", 390], ["dark", 390]];
    const inspect = async (step) => {
        for (const [scheme, width] of looks) {
            await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
            await page.setViewport({ width, height: 900 });
            await new Promise((done) => setTimeout(done, 400)); // for transitions
            const found = await page.evaluate(() => axe.run());
            for (const { id, impact } of found.violations) {
                if (["serious", "critical"].includes(impact)) result.violations.push(id);
            }
            result.overflow ||= await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
            if (folder) await page.screenshot({ path: `${folder}/${step}-${scheme}-${width}.png`, fullPage: true });
        }
        await page.setViewport({ width: 1280, height: 900 });
    };
    await inspect("figures");
    if (await page.$("#groups .group")) {
        await page.click("#groups .toggle");
        await page.waitForSelector(`${SHOWN} tbody button`, { timeout: 15_000 });
        await inspect("letters");
        await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "light" }]);
        await page.click(`${SHOWN} tbody button`);
        if (await page.$("#confirm[open]")) await page.click("#confirm-yes");
        await page.waitForFunction(() => document.querySelector("#result").textContent, { timeout: 35_000 });
        result.retried = await page.$eval("#result", (element) => element.classList.contains("ok"));
        if (!result.retried) result.console.push(await page.$eval("#result", (element) => element.textContent));
    }
} catch (error) {
    result.console.push(String(error));
} finally {
    await browser.close();
}
result.violations = [...new Set(result.violations)];
console.log(JSON.stringify(result));

# Install silently on a Windows machine, see the service run and stop, uninstall: try_service.ps1
# INSTALLER.exe|.msi [-Test] (administrators only). -Test: run the tests against what is installed and the one file beside the installer.
param([Parameter(Mandatory)] [string] $Installer, [switch] $Test)
$ErrorActionPreference = "Stop"
$installed = "$env:ProgramFiles\Medplum Agent"

function Run([string] $Program, [string[]] $Arguments) {
    $process = Start-Process $Program $Arguments -Wait -PassThru
    if ($process.ExitCode -ne 0) { throw "$Program ended with $($process.ExitCode)" }
}

function Install([string[]] $Settings) {
    if ($Installer -like "*.msi") { Run "msiexec.exe" (@("/i", "`"$Installer`"", "/qn") + $Settings) }
    else { Run $Installer (@("/S") + ($Settings -replace "^CONFIG", "/CONFIG")) }
}

$given = "$env:TEMP\given.properties"
"baseUrl=http://127.0.0.1:9/", "clientId=c1", "clientSecret=s1", "agentId=a1" | Set-Content $given
Install @("CONFIG=$given")
(Get-Service MedplumAgent).WaitForStatus("Running", "00:00:30")
foreach ($try in 1..30) { # it has got so far that it writes its log
    if (Get-ChildItem "$env:ProgramData\MedplumAgent" -Recurse -Filter "medplum-agent-main-*") { break }
    if ($try -eq 30) { throw "the agent writes no log" }
    Start-Sleep 1
}
foreach ($path in "$installed\agent.properties", "$env:ProgramData\MedplumAgent") {
    $acl = Get-Acl $path
    $readers = $acl.Access.IdentityReference.Value -join " "
    if ($readers -match "Users|Everyone|Authenticated") { throw "others can read ${path}: $readers" }
    if ($readers -notmatch "NT SERVICE\\MedplumAgent") { throw "the service cannot read ${path}: $readers" }
}
if ($acl.Owner -ne "BUILTIN\Administrators") { throw "the data folder belongs to $($acl.Owner)" }
$account = (Get-CimInstance Win32_Service -Filter "Name='MedplumAgent'").StartName
if ($account -ne "NT SERVICE\MedplumAgent") { throw "the service runs as $account" }
if ((Get-NetFirewallRule -DisplayName "Medplum Agent").Profile -ne "Domain, Private") { throw "the firewall rule" }

# Installing again keeps what administrators have set
sc.exe config MedplumAgent depend= Tcpip start= delayed-auto | Out-Null
sc.exe failure MedplumAgent reset= 60 actions= restart/1000 | Out-Null
$before = (sc.exe qc MedplumAgent) + (sc.exe qfailure MedplumAgent)
if ($Installer -notlike "*.msi") { Install @() } # the same .msi would only be repaired
$after = (sc.exe qc MedplumAgent) + (sc.exe qfailure MedplumAgent)
if (Compare-Object $before $after) { throw "the service was changed: $after" }
(Get-Service MedplumAgent).WaitForStatus("Running", "00:00:30")

if ($Test) {
    $env:MEDPLUM_AGENT_BINARY = "$installed\program\medplum-agent.exe"
    $env:MEDPLUM_AGENT_ONE_FILE = (Get-Item "$(Split-Path $Installer)\medplum-agent-*-windows-x86_64.exe").FullName
    python build.py test --binary
    if ($LASTEXITCODE -ne 0) { throw "the tests ended with $LASTEXITCODE" }
}

Stop-Service MedplumAgent
(Get-Service MedplumAgent).WaitForStatus("Stopped", "00:00:30")
if (Get-Process medplum-agent -ErrorAction SilentlyContinue) { throw "the agent outlived its service" }

if ($Installer -like "*.msi") { Run "msiexec.exe" "/x", "`"$Installer`"", "/qn", "PURGE=1" }
else { Run "$installed\uninstall.exe" "/S", "/PURGE" }
foreach ($try in 1..30) {
    if (-not (Test-Path $installed)) { break }
    if ($try -eq 30) { throw "$installed is still there" }
    Start-Sleep 1
}
if (Get-Service MedplumAgent* -ErrorAction SilentlyContinue) { throw "the service is still there" }
"all as it should be"
